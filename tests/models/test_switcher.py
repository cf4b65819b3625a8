"""Named vectors for one model: switching, prefetching, and the example server under load."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models.test_attach import Small, loaded, on_disk, small, state_of, task
from transformers import AutoTokenizer

import taskvec
from taskvec import TaskSwitcher, TaskVector, attach, attached
from taskvec.applying.overlay import Patched
from taskvec.errors import BaseMismatchError, UsageError
from taskvec.models.attach import state_of as live_state

__all__ = ["small"]
SERVER = Path(__file__).parents[2] / "docs" / "examples" / "server.py"
