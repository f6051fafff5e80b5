"""What the cases run inside a boundary: small Python programs, as text, since none of it may ever run on this host.

Each prints BEGUN before its first attempt, so that a program which never started is not mistaken for one that was held,
and (unless it is meant to be ended) ENDED after its last. `P` is what the case tells it. None of them knows a canary's
token: they print whatever has the form of one, and the host compares.
"""

BEGUN = "the attack begins"
ENDED = "the attack ends"
KILLS = "KILLS"
"""What is printed by one that is about to end all it can, itself with it."""

_PRELUDE = f"""
import json, os, re, socket, sys, time
P = json.loads(sys.argv[1])
TOKEN = re.compile(rb"bdcanary[0-9a-f]{{32}}")
def search(where, data):
    for token in set(TOKEN.findall(data)):
        print("FOUND", where, token.decode(), flush=True)
def look(path, limit=1 << 20):
    try:
        with open(path, "rb") as file:
            search(path, file.read(limit))
    except OSError:
        pass
print({BEGUN!r}, flush=True)
"""
_CODA = f"\nprint({ENDED!r}, flush=True)\n"


def _to_its_end(body: str) -> str:
    return _PRELUDE + body + _CODA


def _until_ended(body: str) -> str:
    """Goes on for as long as it is let."""
    return _PRELUDE + body


FORK_BOMB = _until_ended("""
count = os.open("count", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
os.write(count, b"x")
while True:
    try:
        if os.fork() == 0:
            os.write(count, b"x")
    except OSError:
        time.sleep(0.05)
""")
MEMORY_BOMB = _to_its_end("""
held = []
for _ in range(P["mib"]):
    held.append(bytearray(b"x" * (1 << 20)))
""")
TMPFS_BOMB = _to_its_end("""
try:
    file = open(f"{P['place']}/bomb", "wb", buffering=0)
except OSError as error:
    print("REFUSED", error, flush=True)
else:
    for _ in range(P["mib"]):
        try:
            file.write(b"x" * (1 << 20))
        except OSError:  # it holds what it has for a moment
            time.sleep(0.3)
            break
""")
MEMFD_BOMB = _to_its_end("""
with os.fdopen(os.memfd_create("bomb"), "wb") as file:
    for _ in range(P["mib"]):
        file.write(b"x" * (1 << 20))
        file.flush()
""")
FILL_DISK = _to_its_end("""
try:
    with open("big", "wb", buffering=0) as file:
        for _ in range(P["mib"]):
            file.write(b"x" * (1 << 20))
except OSError:
    pass
""")
FILL_INODES = _to_its_end("""
try:
    os.mkdir("many")
    for n in range(P["count"]):
        os.close(os.open(f"many/{n}", os.O_CREAT | os.O_WRONLY))
except OSError:
    pass
""")
HOLD_FILES = _to_its_end("""
os.mkdir("held")
try:
    for n in range(P["count"]):
        os.open(f"held/{n}", os.O_CREAT | os.O_WRONLY)
except OSError:
    pass
""")
FLOOD = _until_ended("""
while True:
    os.write(1, b"A" * 65536)
""")
DAEMON = _to_its_end("""
import signal
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(name, signal.SIG_IGN)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    time.sleep(3600)
    os._exit(0)
os.wait()
""")

SEARCH_PROC = _to_its_end("""
for entry in os.listdir("/proc"):
    if entry.isdigit() or entry == "self":
        for name in ("environ", "cmdline", "mountinfo", "maps", "cgroup", "comm", "status"):
            look(f"/proc/{entry}/{name}")
        try:
            for fd in os.listdir(f"/proc/{entry}/fd"):
                search(f"/proc/{entry}/fd/{fd}", os.readlink(f"/proc/{entry}/fd/{fd}").encode())
        except OSError:
            pass
    else:
        look(f"/proc/{entry}")
for name in ("tcp", "tcp6", "unix", "udp", "route"):
    look(f"/proc/net/{name}")
""")
WRITE_PLACES = _to_its_end("""
for path in P["new"]:
    try:
        with open(path, "x") as file:
            file.write("was here")
        print("WROTE", path, flush=True)
    except OSError:
        pass
for path in P["settings"]:  # what was read is written back: a wall that lets it through is not harmed
    try:
        with open(path, "r+b", buffering=0) as file:
            value = file.read(4096)
            file.seek(0)
            file.write(value)
        print("WROTE", path, flush=True)
    except OSError:
        pass
""")
REACH_PROCESSES = _to_its_end("""
import ctypes, signal
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
if "TOKEN" in os.environ:  # only the control has one, and with it another process, whose memory holds it
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
class Span(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
def spans(pid):
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            place, rights = line.split()[:2]
            start, end = (int(number, 16) for number in place.split("-"))
            if rights.startswith("rw") and end - start <= 8 << 20:
                yield start, end - start
def read_by_call(pid, start, length):
    buffer = ctypes.create_string_buffer(length)
    got = libc.process_vm_readv(
        pid, ctypes.byref(Span(ctypes.addressof(buffer), length)), 1, ctypes.byref(Span(start, length)), 1, 0)
    return buffer.raw[:max(got, 0)]
def read_by_file(pid, start, length):
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        file.seek(start)
        return file.read(length)
others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
for pid in {1, *others}:
    if libc.ptrace(16, pid, None, None) == 0:
        if pid == 1:
            print("ATTACHED", pid, flush=True)
        os.waitpid(pid, 0x40000000)
        libc.ptrace(17, pid, None, None)
    for read in (read_by_call, read_by_file):
        try:
            for start, length in spans(pid):
                search(f"memory of {pid}", read(pid, start, length))
        except OSError:
            pass
print("KILLS", flush=True)
time.sleep(0.5)  # to be heard: what brings its output may be ended with it
try:
    os.kill(1, signal.SIGKILL)
except OSError:
    pass
if os.getuid():  # root of a host whose wall is not there would end the host
    try:
        os.kill(-1, signal.SIGKILL)
    except OSError:
        pass
""")
MOUNT_OVER = _to_its_end("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def leave(place):
    try:
        with open(f"{place}/{P['mark']}", "w"):
            pass
    except OSError:
        pass
def mounted(place):
    return libc.mount(P["mark"].encode(), place.encode(), b"tmpfs", 0, None) == 0
for place in P["places"]:
    if mounted(place):
        leave(place)
if os.fork() == 0:
    user, group = os.getuid(), os.getgid()
    if P["private"]:
        if libc.unshare(0x10000000 | 0x00020000) == 0:
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                try:
                    with open(f"/proc/self/{name}", "w") as file:
                        file.write(text)
                except OSError:
                    pass
            libc.mount(None, b"/usr", None, 0x20, None)
            leave("/usr/bin")
            for place in P["places"]:
                if mounted(place):
                    leave(place)
    else:
        for place in P["places"]:
            leave(place)
    os._exit(0)
os.wait()
""")
LOOK_FOR_MARK = _to_its_end("""
for place in P["places"]:
    if os.path.exists(f"{place}/{P['mark']}"):
        print("STANDS", place, flush=True)
""")
SEARCH_FILES = _to_its_end("""
import fcntl, struct
if "TOKEN" in os.environ:
    with open("/work/planted", "w") as file:
        file.write(os.environ["TOKEN"])
for path in P["sockets"]:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            print("REACHED", path, flush=True)
        except OSError:
            pass
for path in P["devices"]:
    try:
        os.close(os.open(path, os.O_RDONLY))
        print("OPENED", path, flush=True)
    except OSError:
        pass
try:
    with open("/dev/net/tun", "r+b", buffering=0) as tunnel:
        fcntl.ioctl(tunnel, 0x400454CA, struct.pack("16sH22x", b"bd0", 2))
        print("OPENED", "a network interface", flush=True)
except OSError:
    pass
for number, path in enumerate(P["nodes"]):
    try:
        os.mknod(f"/work/node{number}", 0o60600 if path == [8, 0] else 0o20600, os.makedev(*path))
        os.close(os.open(f"/work/node{number}", os.O_RDONLY))
        print("OPENED", path, flush=True)
    except OSError:
        pass
for path in P["files"]:
    for root in ("", "/proc/1/root", "/proc/self/root", "/proc/1/cwd/../../../.."):
        look(root + path)
seen = 0
for top in P["trees"]:
    for directory, names, files in os.walk(top):
        if directory.count("/") > 6:
            names.clear()
        for name in files:
            seen += 1
            path = f"{directory}/{name}"
            if seen < 20000 and os.path.isfile(path):
                look(path, 65536)
""")
CONNECT = _to_its_end("""
import threading
def listen(ear):
    while True:
        connection, _ = ear.accept()
        with connection:
            connection.recv(200)
            connection.sendall(os.environ["TOKEN"].encode())
if P.get("own"):  # only the control has one: a listener of the guest's own, within the wall
    ear = socket.create_server(tuple(P["own"]))
    threading.Thread(target=listen, args=(ear,), daemon=True).start()
for host, port in P["targets"]:
    try:
        with socket.create_connection((host, port), timeout=1) as connection:
            if connection.getsockname() == connection.getpeername():
                continue
            print("REACHED", host, port, flush=True)
            connection.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            search(host, connection.recv(4096))
    except OSError:
        pass
""")
RESOLVE = _to_its_end("""
for host, port in P["targets"]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.sendto(P["name"].encode(), (host, port))
    except OSError:
        pass
try:
    print("RESOLVED", socket.getaddrinfo(P["name"], 80)[0][4], flush=True)
except OSError:
    pass
for name, kind in (
    ("raw", (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
    ("raw IPv6", (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)),
    ("packet", (socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))),
    ("vsock", (socket.AF_VSOCK, socket.SOCK_STREAM, 0)),
):
    try:
        socket.socket(*kind).close()
        print("OPENED", name, flush=True)
    except OSError:
        pass
""")
ENVIRONMENT = _to_its_end("""
with open("/proc/self/environ", "rb") as file:
    words = [word.decode("utf-8", "replace") for word in file.read().split(b"\\0") if word]
print("SEES", json.dumps({"environ": words, "cwd": os.getcwd(), "uid": os.getuid()}), flush=True)
""")
SERVICE_ACCOUNT = _to_its_end("""
if "TOKEN" in os.environ:
    os.makedirs("serviceaccount")
    with open("serviceaccount/token", "w") as file:
        file.write(os.environ["TOKEN"])
for top in P["places"]:
    for directory, _, files in os.walk(top):
        for name in files:
            print("HOLDS", f"{directory}/{name}", flush=True)
            look(f"{directory}/{name}")
for name in os.environ:
    if name.startswith("KUBERNETES_"):
        print("NAMED", name, flush=True)
for host, port in P["targets"]:
    try:
        with socket.create_connection((host, port), timeout=1):
            print("REACHED", host, port, flush=True)
    except OSError:
        pass
""")
PLANT = _to_its_end("""
os.makedirs("out/d")
token = os.environ.get("TOKEN")
for name in P["names"]:
    if token:  # only the control has one: what it plants is what a link would have led to
        with open(f"out/{name}", "w") as file:
            file.write(token)
if not token:
    os.symlink(P["file"], "out/link")
    os.symlink(os.path.dirname(P["file"]), "out/directory")
    os.symlink("/", "out/root")
    os.symlink("/proc/1/environ", "out/environ")
    os.mkfifo("out/pipe")
    socket.socket(socket.AF_UNIX).bind("out/socket")
    with open("out/d/one", "w") as file:
        file.write("twice")
    os.link("out/d/one", "out/hard")
    for source in ("/etc/passwd", P["file"]):
        try:
            os.link(source, "out/passwd")
        except OSError:
            pass
""")
EXIT_EARLY = _until_ended("""
if P["honest"]:
    print("42 tests passed")
    sys.exit(0)
os._exit(0)
print("42 tests passed")
""")
