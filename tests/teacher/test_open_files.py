import resource
import subprocess
import sys

from megatron_mlr1.teacher.open_files import allow_many

LOWERED = """
import resource
from megatron_mlr1.teacher.open_files import allow_many
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
assert allow_many() == hard
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard))
"""


def test_a_soft_limit_is_raised_to_the_hard_one(pytestconfig):
    words = [sys.executable, "-c", LOWERED]
    done = subprocess.run(words, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert done.stdout.strip() == "True", done.stderr


def test_asking_twice_changes_nothing():
    assert allow_many() == allow_many() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
