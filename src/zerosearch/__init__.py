"""Teach a language model to search with an engine that another model plays, after ZeroSearch (arXiv 2505.04588).

Import the room you need (`zerosearch.protocol`, `zerosearch.rollout.loop`, ...). This file stays empty of imports, so
that `import zerosearch` is quick and needs neither torch nor vLLM.
"""

from __future__ import annotations

__version__ = "0.1.0"
