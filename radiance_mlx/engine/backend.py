"""Choosing the device, and the bounds on its memory."""

import contextlib
import ctypes
import platform
import sys
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..config.schema import MemorySection
from ..errors import ConfigError
from ..lora.memory import device_bytes

#: bytes of free buffers that MLX may keep; on a CPU a fresh one costs next to nothing
CACHE_ON_CPU, CACHE_ELSEWHERE = 16 * 2**20, 2**30


@dataclass(frozen=True)
class Backend:
    """The device in use: `name` is metal, cuda or cpu; `device` what it calls itself."""

    name: str
    device: str
    memory_bytes: int


def select(wanted: str, memory: MemorySection) -> Backend:
    """Make `wanted` (auto, metal, mps, cuda, cpu) this thread's default device and set MLX's memory bounds.

    On the CPU `mx.compile` is turned off: there it builds C++ with the system's compiler, and gains nothing.
    Raises `ConfigError` if the machine has no such device.
    """
    name = _resolve("metal" if wanted == "mps" else wanted)
    mx.set_default_device(mx.cpu if name == "cpu" else mx.gpu)
    if name == "cpu":
        mx.disable_compile()
    mx.set_cache_limit(_cache_limit(name, memory))
    if memory.limit_gb is not None:
        mx.set_memory_limit(int(memory.limit_gb * 2**30))
    info: dict[str, Any] = mx.device_info()
    return Backend(name, str(info.get("device_name") or platform.machine()), device_bytes(memory.limit_gb))


def release_memory() -> None:
    """Give back to the system what is free: MLX's buffers, and what the C library holds on to."""
    mx.clear_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def _cache_limit(name: str, memory: MemorySection) -> int:
    if memory.cache_limit_mb is not None:
        return int(memory.cache_limit_mb * 2**20)
    return CACHE_ON_CPU if name == "cpu" else CACHE_ELSEWHERE


def _resolve(wanted: str) -> str:
    has = {"metal": mx.metal.is_available(), "cuda": _cuda_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name in ("metal", "cuda", "cpu") if has[name])
    if not has[wanted]:
        hints = {
            "metal": "Metal needs a Mac with Apple silicon and the macOS wheel of mlx.",
            "cuda": "Install the CUDA build: pip install 'radiance-mlx[cuda]'.",
        }
        raise ConfigError(
            f"backend: {wanted} is not available here.",
            f"{hints[wanted]} Or set backend: auto.",
            [{"key": "backend", "problem": "not available on this machine"}],
        )
    return wanted


def _cuda_available() -> bool:
    return bool(hasattr(mx, "cuda") and mx.cuda.is_available())
