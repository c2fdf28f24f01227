"""What one program may use."""

from dataclasses import asdict, dataclass

from hybrid_lightning.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Limits of one program; its tests, in a process of their own, have the same.

    Raises:
        ConfigError: If a limit is too low for any program, or no number.
    """

    cpu_seconds: int = 5  # CPU time; whole seconds, as the kernel counts
    wall_seconds: float = 10.0  # from start to end, waiting included
    memory_bytes: int = 512 * 2**20  # address space
    file_bytes: int = 4 * 2**20  # size of any file, and of what it prints
    temporary_bytes: int = 16 * 2**20  # of all files together
    threads: int = 32

    def __post_init__(self) -> None:
        least = {
            "cpu_seconds": 1,
            "wall_seconds": 0.1,
            "memory_bytes": 128 * 2**20,
            "file_bytes": 2**10,
            "temporary_bytes": 2**16,
            "threads": 1,
        }
        for name, value in self.as_dict().items():
            if isinstance(value, bool) or not least[name] <= value < float("inf"):
                raise ConfigError(f"{name}={value}: give a number of at least {least[name]}")
            if name != "wall_seconds" and value != int(value):
                raise ConfigError(f"{name}={value}: give a whole number")

    def as_dict(self) -> dict[str, float]:
        """The limits by name."""
        return asdict(self)
