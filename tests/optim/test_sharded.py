"""Matrices that are cut up among processes get the steps of whole ones."""

import json
import subprocess
import sys
from pathlib import Path


def test_two_processes_take_the_steps_of_one():
    script = Path(__file__).with_name("sharded_steps.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) == 6
    assert {name: worst for name, _, worst in found if worst > 1e-6} == {}
