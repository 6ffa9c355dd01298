"""`update --dry-run`: how rows are understood, and how many tokens they are, without a service and without sending."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RadianceError
from ..rows.intake import Intake
from ..rows.preview import Preview, Tokens, counted
from . import output
from .sources import SHOWN_FAULTS, told_as_bad_input

if TYPE_CHECKING:
    from ..client import Client
    from ..config import Config
    from ..lora.encoding import ChatEncoder


def preview(
    intakes: Sequence[Intake],
    connected: "Callable[[], Client]",
    home: Path | None,
    config: Path | None,
    *,
    skip_bad: bool,
    as_json: bool,
) -> int:
    """Look at every row and show what came of it; the exit code is 2 if nothing would be sent."""
    settings, encoder, why = _encoder(connected, home, config)
    previews = []
    for intake in intakes:
        shown = Preview(intake, why_no_tokens=why)
        if encoder is not None and settings is not None:
            shown.tokens = Tokens(settings.base_model, settings.training.max_seq_length)
        mask = settings.training.mask_prompt if settings else True
        with told_as_bad_input(intake.source.name):
            for _ in counted(intake, shown, encoder, mask_prompt=mask):
                pass
        previews.append(shown)
    if as_json:
        bodies = [shown.as_dict() for shown in previews]
        output.print_json(bodies[0] if len(bodies) == 1 else {"sources": bodies})
    else:
        for shown in previews:
            _show(shown.as_dict())
    sound = all(intake.examples and (skip_bad or not intake.refused) for intake in intakes)
    return output.OK if sound else output.USAGE


def _encoder(
    connected: "Callable[[], Client]", home: Path | None, config: Path | None
) -> "tuple[Config | None, ChatEncoder | None, str]":
    """The tokenizer of the base that runs, or else is configured; or why there is none."""
    from ..config import load_config

    settings = None
    try:
        flags = {}
        with suppress(RadianceError), connected() as client:
            facts = client.info()
            training = facts.config.get("training") or {}
            names = [name for name in ("max_seq_length", "mask_prompt") if name in training]
            flags = {"base_model": facts.base_model, **{f"training.{name}": training[name] for name in names}}
        settings = load_config(config_file=config, home=home, flags=flags).config
        from ..offline import encoder

        return settings, encoder(settings), ""
    except RadianceError as error:
        return settings, None, error.message
    except ImportError as error:
        return settings, None, f"{error.name} is not installed"


def _show(body: dict[str, Any]) -> None:
    out = output.out()

    def line(text: str) -> None:
        out.print(output.printable(text), soft_wrap=True)

    formats = ", ".join(f"{name} {count}" for name, count in body["formats"].items()) or "none that is known"
    line(f"{body['source']} ({body['kind']}): {body['rows']} rows, {body['examples']} examples · formats: {formats}")
    if body["columns"]:
        line(f"columns: {body['columns']}")
    if body["left_out"]:
        line(f"columns left out: {', '.join(body['left_out'])}")
    for remark in body["remarks"]:
        line(remark)
    line(_tokens(body["tokens"]) if body["tokens"] else f"tokens: not counted ({body['why_no_tokens']})")
    for shown in body["shown"]:
        of = f", answer {shown['answers']} of {shown['answers']}" if shown["answers"] > 1 else ""
        line(f"\n{shown['place']} ({shown['format']}{of})")
        if shown["asked"]:
            line(f"  asked:  {shown['asked']!r}")
        line(f"  learnt: {shown['learnt']!r}")
    if body["refused"]:
        line(f"\n{len(body['refused'])} refused:")
    for refused in body["refused"][:SHOWN_FAULTS]:
        line(f"  {refused['place']}: {refused['problem']}")
    if len(body["refused"]) > SHOWN_FAULTS:
        line(f"  and {len(body['refused']) - SHOWN_FAULTS} more")
    output.remark("nothing was sent")


def _tokens(tokens: dict[str, Any]) -> str:
    if not tokens["total"]:
        return "tokens: none, for no row can be learnt"
    cut = f"{tokens['cut']} longer than {tokens['max_seq_length']} (training.max_seq_length): they would be cut"
    if not tokens["cut"]:
        cut = f"none longer than {tokens['max_seq_length']}"
    return (
        f"tokens (by the tokenizer of {tokens['tokenizer']}): min {tokens['min']}, median {tokens['median']:g}, "
        f"max {tokens['max']}, in all {tokens['total']}, learnt {tokens['learnt']}; {cut}"
    )
