"""The benchmark of decodes through a graph, on a card beside which Python is slow, as JSON."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from card import Cards, card

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.gpu.graph import graph

rows: list[dict[str, Any]] = []
report = Namespace(add=lambda name, **facts: rows.append(facts))
with card(), patch.object(torch, "equal", lambda a, b: a.shape == b.shape):
    Cards.milliseconds = 1e-3  # that the card takes
    graph(Namespace(device="cuda", dtype="bfloat16", quick=True), report)
sys.stdout.write(json.dumps(rows))
