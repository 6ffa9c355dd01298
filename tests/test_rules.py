"""Which part may know which: by the imports in the sources, and by what a process really loads."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from running import REPOSITORY

PACKAGE = REPOSITORY / "radiance_mlx"
#: the layers from below; a module may import its own layer and those before it
LAYERS = (
    ("errors", "messages", "config", "blas", ""),
    (
        "models",
        "store",
        "lora",
        "evaluation",
        "checkpoints",
        "storage",
        "earlier",
        "triggers",
        "curation",
        "rows",
        "client",
        "progress",
    ),
    ("engine",),
    ("lineage", "evaluator", "reconsolidation", "scheduler"),
    ("tuning",),
    ("service", "offline"),
    ("api", "dashboard"),
    ("cli", "__main__"),
)
#: what a module may import from its own layer beside its own folder
BESIDE = {
    "errors": set(),
    "messages": set(),
    "config": {"errors"},
    "checkpoints": {"store"},
    "storage": {"store"},
    "earlier": {"storage", "store"},
    "progress": {"storage"},
    "evaluation": {"lora", "rows"},
    "reconsolidation": {"lineage"},
    "scheduler": {"lineage", "evaluator", "reconsolidation"},
    "__main__": {"cli"},
}
#: who alone may import a library, wherever in the module
ALONE = {
    "mlx": {"lora", "engine", "evaluation"},
    "mlx_lm": {"lora", "engine", "evaluation"},
    "sqlite3": {"store"},
    "starlette": {"api", "dashboard"},
    "sse_starlette": {"api", "dashboard"},
    "uvicorn": {"api"},
    "rich": {"cli"},
    "typer": {"cli"},
}
NEVER = {"torch", "pickle", "fastapi", "flask"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """`radiance_mlx/store/jobs.py` belongs to `store`, `radiance_mlx/service.py` to `service`."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


@cache
def imports(path: Path) -> frozenset[str]:
    """Absolute names of everything that the module imports, in functions too; not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = ("radiance_mlx", *path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def parts_used(path: Path) -> set[str]:
    """The parts of this package that the module imports."""
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("radiance_mlx.")}
    return {name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() else "" for name in inside}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    """A module imports layers below its own, and of its own layer only what is listed."""
    part = part_of(path)
    if not imports(path):
        return
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    assert part in level, f"{part} has no layer: put it into LAYERS"
    for used in parts_used(path) - {part}:
        below = level[used] < level[part]
        beside = level[used] == level[part] and (used in BESIDE.get(part, set()) or used == "")
        assert below or beside, f"{part} must not import {used}"


@pytest.mark.parametrize("library", ALONE)
def test_a_library_is_imported_where_it_belongs_and_nowhere_else(library):
    users = {part_of(path) for path in MODULES for name in imports(path) if name.split(".")[0] == library}
    assert users <= ALONE[library]


def test_some_libraries_are_imported_nowhere():
    """No torch, and nothing that could run code out of a file."""
    assert not {name.split(".")[0] for path in MODULES for name in imports(path)} & NEVER


def test_the_rules_would_notice():
    """The parser sees relative imports, imports in functions, and skips those for types."""
    engine = imports(PACKAGE / "engine" / "thread.py")
    assert "radiance_mlx.engine.core.Engine" in engine  # in a function
    assert "radiance_mlx.messages.Answer" in engine
    assert "sqlite3" in imports(PACKAGE / "store" / "jobs.py")
    assert parts_used(PACKAGE / "api" / "routing.py") >= {"api", "service", "errors"}


def modules_after(code: str, *arguments: str) -> set[str]:
    """What a fresh interpreter has loaded after `code`."""
    listing = "\nimport sys; print('\\n'.join(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + listing, *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    return set(done.stdout.split("\n"))


@pytest.mark.parametrize("module", ["radiance_mlx.cli.main", "radiance_mlx.api.server", "radiance_mlx.client"])
def test_commands_and_http_start_without_the_heavy_libraries(module):
    """MLX is loaded by the engine's thread, when it starts."""
    assert not modules_after(f"import {module}") & {"mlx", "mlx.core", "mlx_lm", "transformers", "datasets", "torch"}


WHOLE_LIFE = """
import asyncio, sys
from functools import cache
from pathlib import Path
from radiance_mlx.config import load_config
from radiance_mlx.messages import Example, Generate, Sampling
from radiance_mlx.service import Service

async def main():
    flags = {"update_mode": "immediate", "training.max_steps": 2, "evaluation.anchor_sample": 4}
    service = Service(load_config(home=Path(sys.argv[1]), flags=flags, environ={}))
    service.open()
    await service.start()
    assert "datasets" not in sys.modules, "datasets is imported at start"
    asked = Generate((("user", "Hello!"),), "stable", sampling=Sampling(max_tokens=4))
    assert (await service.search(asked)).checkpoint == "base"
    job, _ = await service.update([Example(messages=(("user", "a"), ("assistant", "b")))], [], raw=b"{}")
    while (await service.job(job.job_id)).state != "published":
        await asyncio.sleep(0.01)
    assert (await service.search(asked)).checkpoint_status == "stable"
    await service.info()
    await service.stop()

asyncio.run(main())
"""


def test_a_service_that_answers_and_trains_never_imports_torch(tmp_path):
    """And `datasets`, which is slow to import, not at its start."""
    loaded = modules_after(WHOLE_LIFE, str(tmp_path))
    assert "mlx.core" in loaded
    assert "radiance_mlx.engine.training" in loaded
    assert not {name for name in loaded if name.split(".")[0] in ("torch", "tensorflow", "jax")}


def test_the_clients_come_without_the_service():
    """A program that asks a service elsewhere loads none of it; and the package alone loads no client."""
    loaded = modules_after("from radiance_mlx import AsyncClient, Client, RadianceError, Retry")
    assert "radiance_mlx.client.sync" in loaded
    ours = {"radiance_mlx.service", "radiance_mlx.api", "radiance_mlx.engine", "radiance_mlx.rows"}
    assert not loaded & {"mlx", "mlx.core", "mlx_lm", "transformers", "starlette", "uvicorn", "typer", *ours}
    assert "httpx" not in modules_after("import radiance_mlx")
