"""Run untrusted Python programs in isolation. Uses only the standard library, and little of it, so that starts are fast.

From a program to its result:

    programs.py      runs many programs against their tests, several at a time
    launch.py        starts a launcher process for one program, and reads the result
    launcher.py      the launcher process: starts the boxes of the program, waits for them and ends them; tries mechanisms
    box.py           a box: a process that is isolated before it runs the program, or its tests
    harness.py       runs in the tests' box
    candidate.py     runs in the program's box
    wire.py          encodes values between the two boxes

How a box is isolated:

    isolation.py     which mechanisms this machine has, and whether they are enough
    namespaces.py, landlock.py, seccomp.py, privileges.py    the mechanisms
    libc.py          system calls that Python does not offer
"""
