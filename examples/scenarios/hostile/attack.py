"""Tries what hostile code would try, harmlessly, and tells what happened. Exit code 0: every attempt failed.

An attempt returns what it got hold of; the error that stops it is its failure. Each error is printed as it came.
"""

import ctypes
import errno
import fcntl
import glob
import os
import platform
import signal
import socket
import stat
import struct
import subprocess
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
ATTEMPTS = []
ARM = platform.machine() == "aarch64"


class Nothing(Exception):
    """The call was answered, and there was nothing in it."""


def attempt(what):
    def register(function):
        ATTEMPTS.append((what, function))
        return function

    return register


def attempts(template, things):
    """The same attempt on each of several things."""

    def register(function):
        for thing in things:
            shown = ":".join(map(str, thing)) if isinstance(thing, tuple) else thing
            ATTEMPTS.append((template.format(shown), lambda thing=thing: function(thing)))
        return function

    return register


def system_call(name, x86_64, aarch64, *arguments):
    result = LIBC.syscall(aarch64 if ARM else x86_64, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return f"{name} returned {result}"


# --- read what is not ours ---


@attempts(
    "read {}",
    ["/etc/shadow", "/etc/machine-id", "/etc/resolv.conf", "/root", "/home/*", "/var/lib/*",
     "/var/log/*", "/run/*", "/srv/*", "/opt/*", "/usr/local/*", "/proc/kcore", "/dev/kmsg", "/sys/firmware/*",
     "/var/run/secrets/kubernetes.io/serviceaccount/token"],
)  # fmt: skip
def read(pattern):
    found = glob.glob(pattern) if "*" in pattern else [pattern]
    if not found:
        raise Nothing("nothing is there")
    content = []
    for path in found:
        if os.path.isdir(path):
            content += os.listdir(path)
        else:
            with open(path, "rb") as file:
                content.append(file.read(64))
    if not any(content):
        raise Nothing("it is empty")
    return content


@attempt("find secrets of the platform in the environment of process 1")
def environment_of_one():
    with open("/proc/1/environ", "rb") as file:
        found = file.read().split(b"\0")
    strange = [entry for entry in found if entry and not entry.startswith((b"HOME=", b"PATH="))]
    if not strange:
        raise Nothing(f"there is only {b' '.join(found).decode().strip()}")
    return strange


@attempt("find secrets of the platform in our own environment")
def own_environment():
    known = {"PATH", "HOME", "LANG", "TMPDIR", "SECRET_OF_THIS_RUN"}
    strange = {name: value for name, value in os.environ.items() if name not in known}
    if not strange:
        raise Nothing("only the documented names are there")
    return strange


@attempt("find what an earlier run left in /tmp, and leave something for the next")
def earlier_run():
    found = [name for name in os.listdir("/tmp") if name.startswith("was-here")]
    with open(f"/tmp/was-here-{os.getpid()}", "w"):
        pass
    if not found:
        raise Nothing("nothing was left")
    return found


# --- reach somebody ---


@attempts(
    "connect to {}",
    [("1.1.1.1", 443), ("8.8.8.8", 53), ("169.254.169.254", 80), ("fd00:ec2::254", 80), ("10.0.0.1", 443),
     ("172.17.0.1", 2375), ("192.168.0.1", 80), ("2606:4700:4700::1111", 443)],
)  # fmt: skip
def connect(address):
    with socket.create_connection(address, timeout=2) as connection:
        return connection.getpeername()


@attempt("send a UDP packet to a name server")
def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        return sender.sendto(b"\0" * 12, ("8.8.8.8", 53))


@attempts("resolve {}", ["example.com", "metadata.google.internal", "kubernetes.default.svc"])
def resolve(name):
    return socket.getaddrinfo(name, 443)


@attempt("find a listener on the loopback: ports to 1024, 8000 to 9000, and those of known servers")
def loopback():
    known = [2375, 2379, 3306, 4194, 5432, 6379, 6443, 10250, 10255, 11211, 27017]
    found, refused = [], 0
    for port in [*range(1, 1025), *range(8000, 9001), *known]:
        with socket.socket() as probe:
            error = probe.connect_ex(("127.0.0.1", port))
            refused += error == errno.ECONNREFUSED
            if error == 0 and probe.getsockname() != probe.getpeername():  # a port may be picked to call itself
                found.append(port)
    if not found:
        raise Nothing(f"{refused} refused")
    return found


@attempts("talk to {}", ["/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/crio/crio.sock"])
def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        return path


@attempts("open a {} socket", ["raw IP", "packet", "vsock"])
def special_socket(kind):
    families = {
        "raw IP": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        "packet": (socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)),
        "vsock": (socket.AF_VSOCK, socket.SOCK_STREAM, 0),
    }
    with socket.socket(*families[kind]) as opened:
        return opened


@attempt("find a network interface other than the loopback")
def interfaces():
    found = [name for _, name in socket.if_nameindex() if name != "lo"]
    if not found:
        raise Nothing("there is only lo")
    return found


# --- write where it lasts ---


@attempts(
    "write {}",
    ["/was-here", "/etc/cron.d/was-here", "/etc/ld.so.preload", "/usr/bin/was-here", "/usr/local/bin/was-here",
     "/var/spool/cron/crontabs/root", "/root/.ssh/authorized_keys", "/run/was-here", "/lib/was-here"],
)  # fmt: skip
def write(path):
    with open(path, "a"):
        pass
    return path


@attempts("open {} for writing", ["/etc/passwd", "/usr/bin/python3", "/proc/sys/kernel/core_pattern",
                                  "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/sys/kernel/uevent_helper",
                                  "/sys/fs/cgroup/release_agent"])  # fmt: skip
def open_for_writing(path):
    with open(path, "r+"):
        return path


# --- see and touch others ---


@attempt("see processes other than our own and the sandbox's first")
def others():
    own = {1, os.getpid(), os.getppid()}
    found = [name for name in os.listdir("/proc") if name.isdigit() and int(name) not in own]
    if not found:
        raise Nothing("there are none")
    return found


@attempt("signal process 1")
def signal_one():
    os.kill(1, 0)
    return "a signal would reach it"


@attempt("trace process 1")
def trace_one():
    ptrace_attach, ptrace_detach = 16, 17
    if LIBC.ptrace(ptrace_attach, 1, None, None) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    LIBC.ptrace(ptrace_detach, 1, None, None)
    return "attached"


@attempt("read the memory of process 1")
def memory_of_one():
    with open("/proc/1/mem", "rb") as file:
        return file


# --- become more ---


@attempt("become root")
def become_root():
    os.setuid(0)
    return os.getuid()


@attempt("become root by a set-uid program")
def set_uid_program():
    found = [path for path in glob.glob("/usr/bin/*") + glob.glob("/usr/sbin/*") if _is_set_uid_root(path)]
    if not found:
        raise Nothing("there is none")
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    capabilities = {name: int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd") if name in status}
    if any(capabilities.values()):
        return capabilities
    os.setresuid(-1, 0, -1)
    return os.geteuid()


def _is_set_uid_root(path):
    try:
        status = os.stat(path)
    except OSError:
        return False
    return bool(status.st_mode & stat.S_ISUID) and status.st_uid == 0


@attempt("mount a file system")
def mount():
    os.makedirs("mounted", exist_ok=True)
    if LIBC.mount(b"none", b"mounted", b"tmpfs", 0, None) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return "mounted"


@attempt("write to /usr as root of namespaces of our own")
def namespaces():
    """gVisor lets anyone be root of namespaces that it makes up; what matters is whether that reaches anything."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(write_as_root_of_namespaces())
        except OSError as error:
            os._exit(error.errno)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, os.strerror(code))
    return "it was written to"


def write_as_root_of_namespaces():
    user, group, new_namespaces, remount = os.getuid(), os.getgid(), 0x10000000 | 0x00020000, 0x20
    if LIBC.unshare(new_namespaces) < 0:
        return ctypes.get_errno()
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    LIBC.mount(None, b"/usr", None, remount, None)  # whether it works or not: the write decides
    with open("/usr/bin/was-here", "w"):
        return 0


@attempts("make the device node {}", ["mem 1:1", "sda 8:0", "kvm 10:232"])
def device_node(which):
    name, _, numbers = which.partition(" ")
    major, minor = map(int, numbers.split(":"))
    kind = stat.S_IFBLK if name == "sda" else stat.S_IFCHR
    os.mknod(name, kind | 0o600, os.makedev(major, minor))
    return name


@attempts("open {}", ["/dev/mem", "/dev/kvm", "/dev/sda", "/dev/vda"])
def open_device(path):
    with open(path, "rb") as file:
        return file.read(1)


@attempt("make a network interface")
def network_interface():
    set_interface, tap = 0x400454CA, 2
    with open("/dev/net/tun", "rb", buffering=0) as tunnel:
        return fcntl.ioctl(tunnel, set_interface, struct.pack("16sH22x", b"was-here", tap))


@attempt("load a kernel module")
def load_module():
    return system_call("init_module", 175, 105, b"", 0, b"")


@attempt("load a BPF program")
def load_bpf():
    return system_call("bpf", 321, 280, 5, ctypes.create_string_buffer(128), 128)


@attempt("set up an io_uring")
def io_uring():
    return system_call("io_uring_setup", 425, 425, 8, ctypes.create_string_buffer(256))


@attempt("open a file by its handle, past every mount")
def open_by_handle():
    handle = ctypes.create_string_buffer(b"\x08\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0", 16)
    directory = os.open("/usr", os.O_RDONLY)
    return system_call("open_by_handle_at", 304, 265, directory, handle, os.O_RDONLY)


@attempt("watch the whole machine with performance counters")
def performance_counters():
    attributes = ctypes.create_string_buffer(b"\0\0\0\0\x70\0\0\0", 128)
    return system_call("perf_event_open", 298, 241, attributes, -1, 0, -1, 0)


# --- take more than our share ---


@attempt("write more than the disk limit")
def fill_disk():
    try:
        with open("big", "wb") as file:
            for _ in range(64):
                file.write(b"\0" * 2**20)
                file.flush()
        return "64 MiB"
    finally:
        os.unlink("big")


@attempt("make more files than the limit")
def fill_inodes():
    os.makedirs("many", exist_ok=True)
    try:
        for number in range(1000):
            with open(f"many/{number}", "w"):
                pass
        return "1000 files"
    finally:
        for name in os.listdir("many"):
            os.unlink(f"many/{name}")


@attempt("open more files at once than the limit")
def fill_descriptors():
    opened = []
    try:
        while len(opened) < 1000:
            opened.append(os.open("/dev/null", os.O_RDONLY))
        return "1000 descriptors"
    finally:
        for descriptor in opened:
            os.close(descriptor)


@attempt("start more processes than the limit")
def fill_processes():
    pids = []
    try:
        while len(pids) < 100:
            pid = os.fork()
            if pid == 0:
                time.sleep(30)
                os._exit(0)
            pids.append(pid)
        return "100 processes"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


# --- what is only seen from outside ---


def plant():
    """Links for the collector to follow, and a process to outlive us: the host must ignore these and end that."""
    os.makedirs("loot", exist_ok=True)
    for name, target in (("shadow", "/etc/shadow"), ("host", "/"), ("environ", "/proc/1/environ")):
        os.symlink(target, f"loot/{name}")
    os.mkfifo("loot/pipe")
    with open("loot/note.txt", "w") as file:
        file.write("the only regular file among the loot\n")
    patience = "trap '' TERM HUP INT QUIT; while :; do sleep 1; done"
    left = subprocess.Popen(
        ["/bin/sh", "-c", patience], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    print(f"left behind: process {left.pid}, which ignores signals, and loot/ full of links")
    left.returncode = 0  # nobody waits for it


def main():
    if os.getcwd() != "/work" or os.geteuid() == 0:
        print("this is for a sandbox: blastdoor run examples/scenarios/hostile", file=sys.stderr)
        return 2
    succeeded = 0
    for what, function in ATTEMPTS:
        try:
            got = function()
        except (OSError, Nothing) as error:
            print(f"  failed     {what}: {error}", flush=True)
        else:
            succeeded += 1
            print(f"  SUCCEEDED  {what}: {got!r:.200}", flush=True)
    plant()
    print(f"{len(ATTEMPTS)} attempts, {succeeded} succeeded")
    return 1 if succeeded else 0


sys.exit(main())
