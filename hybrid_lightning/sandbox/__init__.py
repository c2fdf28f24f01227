"""Run untrusted Python programs in isolation, with only the standard library; each start loads little of it.

From a program to its result:

    programs.py      runs many programs against their tests, several at a time
    launch.py        starts a launcher process for one program, and reads the result
    launcher.py      the launcher process: starts the boxes of the program, waits for them and ends them; tries mechanisms
    box.py           a box: a process that is isolated before it runs the program, or its tests
    harness.py       runs in the box of the tests
    candidate.py     runs in the box of the program
    wire.py          values as bytes between these two

How a box is isolated:

    isolation.py     which mechanisms this machine has, and whether they are enough
    namespaces.py, landlock.py, seccomp.py, privileges.py    the mechanisms
    libc.py          system calls that Python does not offer
"""
