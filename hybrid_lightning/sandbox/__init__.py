"""Run untrusted Python programs in isolation, with nothing but the standard library, of which each start loads little.

From a program to its result:

    programs.py      runs many programs against their tests, several at a time
    launch.py        starts a launcher process for one program, and reads the result
    launcher.py      the launcher process: starts the boxes of the program, waits for them and ends them; tries mechanisms
    box.py           a box: a process that is isolated before it runs the program, or its tests
    harness.py       what the box of the tests runs
    candidate.py     what the box of the program runs
    wire.py          values as bytes between these two

How a box is isolated:

    isolation.py     which mechanisms this machine has, and whether they are enough
    namespaces.py, landlock.py, seccomp.py, privileges.py    the mechanisms
    libc.py          system calls that Python does not offer
"""
