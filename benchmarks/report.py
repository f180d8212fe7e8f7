"""What every benchmark shares: its options, and one JSON form for its figures."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark understands."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--json", type=Path, help="write the figures to this file")
    made.add_argument("--quick", action="store_true", help="smoke size: checks that it runs, measures nothing")
    return made


@dataclass
class Report:
    """Figures by name; ``write`` prints them and stores them with machine, commit and command."""

    began: float = field(default_factory=time.perf_counter)
    figures: dict[str, float] = field(default_factory=dict)
    tree: str = ""  # the commit at the start: the working tree may move on meanwhile

    def __post_init__(self) -> None:
        self.tree = self.tree or commit()

    def add(self, name: str, value: float, note: str = "") -> None:
        self.figures[name] = value
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        print(f"{name:32} {shown:>12}  {note}", flush=True)

    def write(self, path: Path | None) -> None:
        if path is None:
            return
        content = {
            "figures": self.figures,
            "machine": machine(),
            "commit": self.tree,
            "command": " ".join(["python", *(_module_form(sys.argv))]),
            "seconds": round(time.perf_counter() - self.began, 2),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")


def machine() -> str:
    """Processor, cores and interpreter in words."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def commit() -> str:
    """The commit of the working tree, marked when it has changes."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _module_form(arguments: list[str]) -> list[str]:
    script = Path(arguments[0])
    return ["-m", f"{script.parent.name}.{script.stem}", *arguments[1:]]
