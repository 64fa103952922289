"""``python -m vluna_llm`` is the command ``vluna-llm``."""

from __future__ import annotations

from .cli import main

main()
