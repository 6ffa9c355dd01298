"""For the benchmark against mlx-lm: its trainer as a process."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from bench_clients import ROOT, environment, peak_mb


class Lora:
    """`mlx_lm lora` on `rows`, which are masked but for running text; `parameters` are its `lora_parameters`."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        rows: Sequence[dict[str, str]],
        steps: int,
        *,
        batch: int,
        parameters: dict[str, Any],
    ) -> None:
        data = folder / "data"
        data.mkdir(exist_ok=True)
        for name in ("train", "valid"):
            (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = data / "lora.yaml"
        config.write_text(yaml.safe_dump({"lora_parameters": parameters, "mask_prompt": "text" not in rows[0]}))
        self.adapter = folder / "lora"
        command = [sys.executable, "-m", "mlx_lm", "lora", "--train", "--model", str(model), "-c", str(config)]
        command += ["--data", str(data), "--adapter-path", str(self.adapter), "--iters", str(steps)]
        command += ["--batch-size", str(batch), "--learning-rate", "1e-9", "--num-layers", "-1"]
        command += ["--steps-per-report", "5", "--val-batches", "0", "--steps-per-eval", "1000000"]
        command += ["--save-every", "1000000", "--max-seq-length", "1024"]
        environ = environment() | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, cwd=ROOT
        )
        self.peak_mb = 0.0
        self._said: list[tuple[float, str]] = []

    def run(self) -> "Lora":
        """Read to the end, keeping when each line came and the highest memory seen."""
        assert self.process.stdout
        for line in self.process.stdout:
            self._said.append((time.perf_counter(), re.sub(r"\x1b\[[0-9;]*m", "", line)))
            if self.process.poll() is None:
                self.peak_mb = max(self.peak_mb, peak_mb(self.process.pid))
        if self.process.wait():
            raise SystemExit("mlx_lm lora failed:\n" + "".join(line for _, line in self._said[-20:]))
        return self

    @property
    def steps_per_s(self) -> float:
        """Between its first report, which has the warming up in it, and its last."""
        found = [(t, re.match(r"\s*(\d+)\s+[\d.]+\D+[\d.]+", line)) for t, line in self._said]
        reports = [(t, int(m[1])) for t, m in found if m]
        (start, before), (end, after) = reports[0], reports[-1]
        return (after - before) / (end - start)
