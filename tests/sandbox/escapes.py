# ruff: noqa: E501  (a program is one entry, however long)
"""Programs that try to get out, to learn what is not theirs, or to use more than they may.

Each is the body of a `try`: it must raise where it is held. `$NAME` stands for what the test sets up: `$secret` and `$folder`, a
file and its folder, which anyone may read and write; `$pid`, the test's process; `$victim`, a process that waits; `$port` and
`$socket`, on which something listens; `$package`, a folder that may be imported; `$above`, the host's folder of all
these, beside which another begins with `beside_`.
"""

import re

_LIBC = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
_CHECKED = (
    _LIBC
    + """
def system_call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
"""
)

FILES = {
    "read a file": "open('$secret').read()",
    "read by descriptor": "import os; os.open('$secret', os.O_RDONLY)",
    "read the users": "open('/etc/passwd').read()",
    "list the folder": "import os; assert os.listdir('$folder')",
    "list the home of the user": "import os; os.listdir('$home') and open('$home/.bashrc').read()",
    "list processes": "import os; assert [name for name in os.listdir('/proc') if name.isdigit()]",
    "read the parent's environment": "open('/proc/$pid/environ').read()",
    "read the parent's memory": "open('/proc/$pid/mem', 'rb').seek(4096)",
    "read the parent's command": "open('/proc/$pid/cmdline').read()",
    "read the memory of all": "open('/proc/kcore', 'rb').read(1)",
    "write its own memory": "open('/proc/self/mem', 'r+b')",
    "the root of another process": "import os; os.listdir(os.path.join('/proc/1', 'root'))",
    "a relative way up": "open('../../../../../../..$secret').read()",
    "a symbolic link": "import os; os.symlink('$secret', 'link'); open('link').read()",
    "a hard link": "import os; os.link('$secret', 'link'); open('link').read()",
    "another library": "import torch",
    "the package of the sandbox": "import hybrid_lightning.rewards",
    "change a file": "open('$secret', 'r+').write('changed')",
    "make a file": "open('$folder/made', 'w').close()",
    "delete a file": "import os; os.remove('$secret')",
    "move a file out": "import os; open('made', 'w').close(); os.rename('made', '$folder/made')",
    "cut a file off": "import os; os.truncate('$secret', 0)",
    "change a mode": "import os; os.chmod('$secret', 0)",
    "change an owner": "import os; os.chown('$secret', 0, 0)",
    "change a time": "import os; os.utime('$secret', (1, 1))",
    "write into the system": "open('/usr/lib/made', 'w').close()",
    "write into the root": "open('/made', 'w').close()",
    "write into the standard library": "import os; open(os.__file__, 'a').close()",
    "make a device": "import os, stat; os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(254, 0)); open('disk', 'rb').read(1)",
    "read the disk": "open('/dev/vda', 'rb').read(1)",
    "shared memory": "from multiprocessing import shared_memory; shared_memory.SharedMemory('sandbox', True, 10)",
    "change the root": "import os; os.chroot('/tmp')",
    "descriptors left open": "import os; assert any(os.fstat(n) for n in range(3, 4096))",
    "its environment": "import os; assert os.environ.keys() - {'OPENBLAS_NUM_THREADS'}",
    "its environment by libc": _LIBC + "libc.getenv.restype = ctypes.c_char_p; assert libc.getenv(b'SANDBOX_SECRET')",
}

# Where a package may be imported that lies below the temporary folder.
PACKAGES = {
    "change a package": "open('$package/__init__.py', 'r+').write('changed')",
    "cut a package off": "import os; os.truncate('$package/__init__.py', 0)",
    "add a folder to a package": "import os; os.mkdir('$package/made')",
    "add to a package": "open('$package/made.py', 'w').close()",
    "link out of a package": "import os; os.symlink('$secret', '$package/made'); open('$package/made').read()",
    "delete of a package": "import os; os.remove('$package/__init__.py')",
    "move a package": "import os; os.rename('$package', '/tmp/moved')",
    "another in its place": "import os; os.mkdir('/tmp/mine'); os.rename('/tmp/mine', '$package')",
    "up from a package": "open('$package/../../../../../host/secret').read()",
    "another package": "import not_lent",
    "read another package": "import os; open(os.path.dirname('$package') + '/not_lent/__init__.py').read()",
    "list what is beside": "import os; assert 'not_lent' in os.listdir(os.path.dirname('$package'))",
    "list what is above": "import os; assert 'host' in os.listdir('$above')",
    "list the folder of all": "import os; assert any(name.startswith('beside_') for name in os.listdir('$above/..'))",
}

NETWORK = {
    "connect": "import socket; socket.create_connection(('127.0.0.1', $port), 1)",
    "connect by libc": _LIBC + "assert libc.socket(2, 1, 0) >= 0",
    "connect to a file": "import socket; socket.socket(socket.AF_UNIX).connect('$socket')",
    "an abstract socket": "import socket; socket.socket(socket.AF_UNIX).bind('\\0sandbox')",
    "datagrams": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', $port))",
    "the kernel's socket": "import socket; socket.socket(socket.AF_NETLINK)",
    "listen": "import socket; socket.create_server(('', 0))",
    "a pair of sockets": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "ask for a name": "import socket; socket.getaddrinfo('example.com', 80)",
}

PROCESSES = {
    "fork": "import os; os.fork()",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "fork by libc": _LIBC + "assert libc.fork() >= 0",
    "clone by libc": _CHECKED + "system_call(56, 17, 0, 0, 0, 0)",
    "a namespace by clone": _CHECKED + "system_call(56, 0x10000011, 0, 0, 0, 0)",
    "spawn": "import os; os.posix_spawn('/bin/sh', ['sh'], {})",
    "exec": "import os, sys; os.execv('/bin/sh', ['sh'])",
    "a session of its own": "import os; os.setsid()",
    "a group of its own": "import os; os.setpgid(0, 0)",
    "signal the parent": "import os; os.kill($pid, 0)",
    "kill another": "import os; os.kill($victim, 9)",
    "kill all": "import os; os.kill(-1, 9)",
    "kill the group": "import os; os.killpg(0, 9)",
    "kill the one who waits": "import os; os.kill(os.getppid(), 9)",
    "signal a thread": _CHECKED + "system_call(200, $victim, 9)",
    "signal with a value": _CHECKED + "system_call(129, $victim, 9, 0)",
    "signal by descriptor": "import os, signal; signal.pidfd_send_signal(os.pidfd_open($victim), 9)",
    "signals by a pipe": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, $victim)",
    "the signal of a pipe": "import fcntl, os; fcntl.fcntl(os.pipe()[0], 10, 9)",
    "trace": _CHECKED + "system_call(101, 16, $victim, 0, 0)",
    "limits of another": "import resource; resource.prlimit($victim, resource.RLIMIT_CPU, (1, 1))",
    "priority of another": "import os; os.setpriority(os.PRIO_PROCESS, $victim, 19)",
    "processors of another": "import os; os.sched_setaffinity($victim, {0})",
    "become root": "import os; os.setuid(0); assert os.getuid() == 0",
    "outlive the parent": _LIBC + "assert libc.prctl(1, 0, 0, 0, 0) == 0",
    "lift a limit": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "lift the limit on core dumps": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))",
    "be spared when memory is short": "open('/proc/self/oom_score_adj', 'w').write('-1000')",
    "a thread in namespaces of its own": _CHECKED + "system_call(56, 0x30900, 0, 0, 0, 0)",
    "a semaphore with a name": _LIBC + "libc.sem_open.restype = ctypes.c_void_p; assert libc.sem_open(b'/x', 64, 0o666, 1)",
    "a lasting lock": "import fcntl; fcntl.flock(open('x', 'w'), 2)",
    "a lease": "import fcntl; fcntl.fcntl(open('x', 'w'), 1024, 1)",
    "news of a folder": "import fcntl, os; fcntl.fcntl(os.open('.', 0), 1026, 1)",
    "a large pipe": "import fcntl, os; fcntl.fcntl(os.pipe()[0], 1031, 2**20)",
    "a file that others run as its owner": "import os; os.fchmod(open('x', 'w').fileno(), 0o4777)",
    "a terminal": "import os; os.openpty()",
    "the terminal": "import os; os.open('/dev/tty', os.O_RDWR)",
    "files of the one who waits": "import os; os.listdir(f'/proc/{os.getppid()}/fd')",
    "lift the memory limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
}

# By number on x86_64. All are refused whatever they are given, by the filter and not for what they are given; except the last
# two: their second argument decides.
_CALLS = """
mount 165; umount 166; pivot_root 155; unshare 272; setns 308; clone3 435; process_vm_readv 310; process_vm_writev 311;
pidfd_getfd 438; kcmp 312; bpf 321; perf_event_open 298; io_uring_setup 425; userfaultfd 323; keyctl 250; add_key 248;
memfd_create 319; shmget 29; msgget 68; mq_open 240; open_by_handle_at 304; fanotify_init 300; inotify_init 253; init_module 175;
kexec_load 246; reboot 169; swapon 167; sethostname 170; settimeofday 164; ptrace 101; seccomp 317; landlock 444; personality 135;
sendmsg 46; timer_create 222; timerfd_create 283; eventfd2 290; signalfd4 289; prctl 157; pidfd_open 434; rt_tgsigqueueinfo 297;
semget 64; memfd_secret 447; vfork 58; execve 59; execveat 322; capset 126; splice 275; mlockall 151; syslog 103; modify_ldt 154; fsopen 430;
open_tree 428; openat2 437; a terminal's input 16 0x5412; the owner of a descriptor 16 0x8901
"""
_REFUSED = _LIBC + "assert libc.syscall(ctypes.c_long({}), 0, {}, 0, 0, 0, 0) >= 0 or ctypes.get_errno() not in (1, 38)"
SYSTEM_CALLS = {
    name: _REFUSED.format(number, argument or 0)
    for name, number, argument in re.findall(r"([a-z].*?) (\d+)(?: (0x\w+))?(?:;|$)", _CALLS, re.MULTILINE)
}

RESOURCES = {
    "memory": "bytearray(2**30)",
    "memory bit by bit": "held = []\nwhile True: held.append(bytearray(2**22))",
    "mapped memory": "import mmap; mmap.mmap(-1, 2**31)",
    "a long file": "open('long', 'wb').write(bytes(2**23))",
    "a long file with a hole": "open('long', 'wb').truncate(2**40)",
    "many files": "for number in range(5000): open(str(number), 'w').close()",
    "much in files": "for number in range(40): open(str(number), 'wb').write(bytes(2**20))",
    "much in files without names": "import os\nheld = []\nfor number in range(40):\n"
    "    held.append(open('x', 'wb')); os.remove('x'); held[-1].write(bytes(2**20)); held[-1].flush()",
    "much in mapped files": "import mmap\nfor number in range(40):\n"
    "    with open(str(number), 'w+b') as file:\n        file.truncate(2**20); mmap.mmap(file.fileno(), 2**20)\n"
    "    open(str(number), 'r+b').write(bytes(2**20))",
    "its own output with a hole": "import os\nos.ftruncate(1, 2**40)",
    "deep folders": "import os\nfor number in range(3000):\n    os.mkdir('x'); os.chdir('x')",
    "many descriptors": "import os; held = [os.dup(0) for number in range(1000)]",
    "many threads": "import threading, time\nfor number in range(500):\n    threading.Thread(target=time.sleep, args=(0.3,), daemon=True).start()",
    "many small threads": "import threading, time; threading.stack_size(2**15)\n"
    "for number in range(5000):\n    threading.Thread(target=time.sleep, args=(0.3,), daemon=True).start()",
    "much output": "import sys\nwhile True: sys.stdout.write('x' * 2**20)",
    "deep recursion": "def f(): return f() + 1\nf()",
}

# These end by force, or not at all: whatever comes after them is never printed.
ENDLESS = {
    "loop": "while True: pass",
    "loop against signals": "import signal\nfor number in range(1, 32):\n"
    "    if number not in (9, 19): signal.signal(number, signal.SIG_IGN)\nwhile True: pass",
    "sleep": "import time; time.sleep(1000)",
    "a backtracking pattern": "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
    "crash": "import ctypes; ctypes.string_at(0)",
    "crash in threads": "import ctypes, threading\nfor _ in range(8): threading.Thread(target=ctypes.string_at, args=(0,)).start()",
    "abort": "import os; os.abort()",
    "the other system calls": _CHECKED + "system_call(0x40000000 + 39)",
    # mov eax, 20; int 0x80; ret: getpid as a 32-bit program would ask for it
    "the calls of 32 bits": "import ctypes, mmap; page = mmap.mmap(-1, 4096, prot=7); page.write(bytes.fromhex('b814000000cd80c3'))\n"
    "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()",
}
