"""The comparison of sampling and training log-probabilities, on the embedded policy."""

import sys

import fork_server


def test_float32_agrees_and_the_table_says_how_far():
    command = [sys.executable, "-m", "benchmarks.speed.agreement", "--workload", "tiny", "--steps", "1"]
    done = fork_server.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, dtype, tokens, mean, *shares, largest = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert (name, dtype) == ("`tiny`", "float32") and int(tokens) > 300
    assert 0 < float(mean) < float(largest) < 1e-4
    assert sorted(map(float, shares)) == [float(share) for share in shares] and len(shares) == 4
