"""What a benchmark must show: figures beside the wanted ones, and how many were missed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Wanted:
    """The figures so far."""

    missed: int = field(default=0, init=False)

    def least(self, label: str, found: float, bound: float) -> None:
        """Print a figure that must not be smaller."""
        self._print(label, found, f">= {bound:g}", found >= bound)

    def most(self, label: str, found: float, bound: float) -> None:
        """Print a figure that must not be larger."""
        self._print(label, found, f"<= {bound:g}", found <= bound)

    def _print(self, label: str, found: float, bound: str, is_met: bool) -> None:
        self.missed += not is_met
        print(f"{label:56} {found:9.2f}   wanted {bound:8} {'' if is_met else 'MISSED'}".rstrip(), flush=True)
