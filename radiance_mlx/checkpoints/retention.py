"""Which checkpoint folders may go, when `storage.keep_checkpoints` bounds their number. Pure."""

from collections.abc import Sequence


def removable(folders: Sequence[str], lineage: Sequence[str], keep: int) -> list[str]:
    """Names to delete so that `keep` folders stay.

    `folders` are all checkpoints on disk, oldest first; `lineage` is the stable one and its ancestors, newest
    first. The stable checkpoint and its parent always stay; what is off the lineage goes first, then the
    oldest ancestors. `keep` 0 keeps everything.
    """
    if keep == 0 or len(folders) <= keep:
        return []
    needed = set(lineage[:2])
    chain = set(lineage)
    by_worth = [f for f in folders if f not in chain] + [f for f in folders if f in chain and f not in needed]
    return by_worth[: len(folders) - keep]
