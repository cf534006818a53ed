"""docs/transformers.md says what is so: its programs run and print what stands below them."""

import json
import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)


def test_every_program_has_its_output():
    assert len(PROGRAMS) == PAGE.count("```python") == 3


def test_the_programs_print_what_the_page_says(tmp_path):
    """Each in a namespace of its own, one after another in one process."""
    run = "import json, sys\nfor code in json.load(sys.stdin):\n    exec(code, {}), print('--')"
    done = subprocess.run(
        [sys.executable, "-c", run],
        input=json.dumps([code for code, _ in PROGRAMS]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("--\n")[:-1] == [output for _, output in PROGRAMS]
