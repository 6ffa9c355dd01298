"""What everything that trains or measures stands on."""

from dataclasses import dataclass
from pathlib import Path

from ..lora.encoding import ChatEncoder
from ..lora.targets import Targets
from .model import BaseModel


@dataclass(frozen=True)
class Foundation:
    """One base, what of it is adapted, how examples become its tokens, and the home with what is kept."""

    base: BaseModel
    targets: Targets
    encoder: ChatEncoder
    home: Path
