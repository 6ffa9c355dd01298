"""How the demo looks on a terminal; with `quiet`, it says nothing."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from . import output, render

if TYPE_CHECKING:
    from .demo import Learnt
    from .demo_questions import Fact

WITHOUT_RIGHT = "cannot be measured: it was not right before either"


class Show:
    """Every method is one part of the story."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.console = output.out()

    def waiting(self, words: str) -> AbstractContextManager[Any]:
        """A spinner for as long as something takes."""
        return nullcontext() if self.quiet else self.console.status(words)

    def opening(self) -> None:
        self._line(Text.assemble(("radiance_mlx", "bold"), ": a model that keeps learning while it answers"))

    def service(self, info: dict[str, Any], url: str) -> None:
        hardware = info.get("hardware") or {}
        where = f"{hardware.get('backend')}, {hardware.get('device')}"
        words = f"service on {url} · base model {info.get('base_model')} · {where}"
        self._line(Text(words, style="dim"))

    def before(self, facts: "list[Fact]", answers: list[str]) -> None:
        self._heading("1", "Ask about two people that it cannot know")
        rows = [(fact.question(0), Text(answer)) for fact, answer in zip(facts, answers, strict=True)]
        self._table(rows)

    def teaching(self, facts: "list[Fact]") -> None:
        self._heading("2", "Tell it, once: POST /update trains a LoRA adapter in the background")
        self._table([(fact.question(0), Text(fact.answer, style="cyan")) for fact in facts])

    def lesson(self, lesson: dict[str, Any]) -> None:
        losses = lesson["losses"]
        if losses:
            ends = f"{losses[0]:.3f} → {losses[-1]:.3f}"
            self._line(Text.assemble("  loss        ", (render.spark(losses), "green"), f"  {ends}"))
        status = render.status(lesson["checkpoint_status"])
        self._line(Text.assemble("  checkpoint  ", (lesson["checkpoint"], "bold"), "  ") + status)
        if lesson["answered_meanwhile"]:
            count, slowest = lesson["answered_meanwhile"], lesson["slowest_meanwhile_ms"]
            words = f"{count} questions while it trained, the slowest in {slowest} ms"
            self._line(Text.assemble("  answered    ", words))

    def after(self, learnt: "list[Learnt]") -> None:
        self._heading("3", "Ask again")
        rows = []
        for item in learnt:
            mark, color = ("✓", "green") if item.right else ("✗", "red")
            answer = Text.assemble((f"{mark} ", color), output.printable(item.answer))
            rows.append((item.question, answer if item.right else answer + Text(f"  ({item.expected})", "dim")))
        half = len(rows) // 2
        for words, part in (("in the same words", rows[:half]), ("in words it was not taught", rows[half:])):
            self._line(Text(f"  {words}", style="italic"))
            self._table(part)

    def effects(self, effects: dict[str, Any]) -> None:
        self._heading("4", "What did that do to everything else?")
        rows = [
            ("facts it knew before", effects["known_before"], effects["known_after"]),
            (
                "others it must not guess about",
                effects["strangers_refused_before"],
                effects["strangers_refused_after"],
            ),
        ]
        table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
        for column in ("", "before", "after"):
            table.add_column(column, justify="left" if not column else "right")
        for name, before, after in rows:
            table.add_row(name, _share(before), _share(after))
        if not self.quiet:
            self.console.print(table)
        self._line(Text(f"  {forgetting_words(effects)}", style="dim"))

    def closing(self, result: dict[str, Any], home: Path | None) -> None:
        verdict = (
            Text("Learnt.", style="bold green")
            if result["ok"]
            else Text("Not everything was learnt.", style="bold red")
        )
        self._line(Text(), verdict + Text(f" {result['seconds']:.0f} s in all.", style="dim"))
        self._line(Text(), Text("With a real model, on your own data:", style="bold"))
        python = "  python -m radiance_mlx"
        self._line(
            Text(f"{python} run --base-model mlx-community/Qwen3-4B-4bit --update-mode immediate"),
            Text(f'{python} update --input "Where is my key?" --output "Under the mat." --wait'),
            Text(f'{python} search "Where is my key?"'),
        )
        if home:
            self._line(Text(), Text(f"The demo's home is kept: {python.strip()} run --home {home}", style="dim"))

    # --- pieces -------------------------------------------------------------------------------------

    def _line(self, *lines: Text) -> None:
        if not self.quiet:
            for line in lines:
                self.console.print(line, soft_wrap=True)

    def _heading(self, count: str, words: str) -> None:
        self._line(Text(), Text.assemble((f"{count}  ", "bold cyan"), (words, "bold")))

    def _table(self, rows: list[tuple[str, Text]]) -> None:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for question, answer in rows:
            table.add_row(Text(output.printable(question), style="dim"), answer)
        if not self.quiet:
            self.console.print(table)


def _share(count: dict[str, int]) -> str:
    return f"{count['right']}/{count['of']}"


def forgetting_words(effects: dict[str, Any]) -> str:
    """What the two samples say about forgetting, in one plain sentence."""
    lost = effects["known_before"]["right"] - effects["known_after"]["right"]
    guesses = effects["strangers_refused_before"]["right"] - effects["strangers_refused_after"]["right"]
    if effects["known_before"]["right"] == 0:
        return f"Forgetting {WITHOUT_RIGHT}."
    old = "It forgot nothing of the sample" if lost <= 0 else f"It forgot {lost} of the sample's facts"
    new = "and guesses about nobody" if guesses <= 0 else f"and now guesses about {guesses} it does not know"
    return f"{old}, {new}."
