"""What scripts try against their worker, as a table: named, with the one ending that each must have."""

from __future__ import annotations

from dataclasses import dataclass

SECRET = "of-the-worker"
"""What the worker has in its environment, and in a file that is root's alone; no script may print it."""


@dataclass(frozen=True)
class Hostile:
    """
    A script, and how its run ends. `out` is all of its standard output; None: whatever it likes.

    One that is `endless` is ended by its deadline. In the script, PORT is its worker's; in `out`, UID is its
    user's number.
    """

    name: str
    script: str
    out: str | None = ""
    code: int = 0
    signal: str | None = None
    endless: bool = False
    truncated: bool = False
    max_output: str = ""
    needs: str = "bash"


KERNEL_FILES = """
for file in sys/kernel/core_pattern sys/vm/swappiness sysrq-trigger; do
    (: >>/proc/$file) 2>/dev/null && echo $file
done; :
"""
"""Opens them to write, and writes nothing."""

# What a script can do to its worker where it runs as another user, and where it runs as the same.
SNOOPING = (
    Hostile(
        "reads_its_worker_by_proc",
        """
        for file in environ mem maps auxv stack syscall io; do
            head -c 1 /proc/$PPID/$file >/dev/null 2>&1 && echo $file
        done
        for link in cwd root exe fd/0 fd/1 fd/2; do readlink /proc/$PPID/$link; done
        ls /proc/$PPID/fd /proc/$PPID/map_files /proc/$PPID/task/*/fd 2>/dev/null
        exit 3
        """,
        code=3,
    ),
    Hostile(
        "reads_all_environments",
        f"cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep {SECRET}; :",
    ),
    Hostile("has_no_more_than_its_own_descriptors", "ls /proc/self/fd | wc -l", out="4\n"),
    Hostile(
        "traces_its_worker",
        """
        python3 - $PPID <<'END'
        import ctypes, sys
        libc = ctypes.CDLL(None)
        for request in (16, 0x4206):  # PTRACE_ATTACH, PTRACE_SEIZE
            if libc.ptrace(request, int(sys.argv[1]), 0, 0) == 0:
                print("traced")
        END
        """.replace("\n        ", "\n"),
        needs="python3",
    ),
)  # fmt: skip

AS_ANOTHER_USER = (
    *SNOOPING,
    Hostile(
        "signals_its_worker",
        "for s in KILL STOP TERM INT HUP USR1 ABRT; do kill -$s $PPID 2>/dev/null && echo $s; done; :",
    ),
    Hostile("kills_its_worker_by_name", "pkill -9 -f 'bfaas[.]basher'; pkill -9 python; echo up", out="up\n"),
    Hostile("kills_whom_it_can", "sleep 1000 & kill -9 -1; echo up", out="up\n"),
    Hostile("stops_whom_it_can", "sleep 1000 & kill -STOP -1; kill -STOP $$", endless=True),
    Hostile(
        "has_its_worker_killed_when_memory_is_out",
        "(echo 1000 >/proc/$PPID/oom_score_adj) 2>/dev/null && echo done; exit 3",
        code=3,
    ),
    Hostile(
        "would_be_spared_when_memory_is_out",
        "cat /proc/self/oom_score_adj; (echo -1 >/proc/self/oom_score_adj) 2>/dev/null && echo done; exit 3",
        out="1000\n",
        code=3,
    ),
    Hostile("reads_what_is_roots_alone", "cat ~/secret ~/api; exit 3", code=3),
    Hostile(
        "talks_to_a_socket_that_is_roots_alone",
        "cd; python3 -c 'import socket; socket.socket(1).connect(\"api\"); print(1)'; :",
        needs="python3",
    ),
    Hostile("belongs_to_a_group_of_its_worker", "id -G", out="UID\n"),
    Hostile("gains_privileges_by_a_setuid_program", "~/setuid -u; ~/setuid -ru", out="UID\nUID\n"),
    Hostile(
        "raises_its_limits",
        "for limit in c n u f; do ulimit -$limit unlimited 2>/dev/null && echo more; ulimit -$limit; done",
        out="0\n1024\n64\n4096\n",
    ),
    Hostile("writes_kernel_files", KERNEL_FILES),
    Hostile(
        "takes_its_workers_port",
        """
        python3 - <<'END'
        import itertools, socket
        for host, options in itertools.product(("127.0.0.1", "0.0.0.0"), ((), (2,), (15,), (2, 15))):
            taken = socket.socket()
            for option in options:  # SO_REUSEADDR, SO_REUSEPORT
                taken.setsockopt(socket.SOL_SOCKET, option, 1)
            try:
                taken.bind((host, PORT))
                taken.listen()
            except OSError:
                continue
            print("listens", host, options)
        END
        """.replace("\n        ", "\n"),
        needs="python3",
    ),
    Hostile(
        "floods_its_worker_with_connections",
        "for i in {1..200}; do exec {fd}<>/dev/tcp/127.0.0.1/PORT; done; echo $fd",
        out="209\n",
    ),
    Hostile(
        "floods_its_worker_with_requests",
        """
        for i in {1..50}; do
            exec 3<>/dev/tcp/127.0.0.1/PORT
            printf 'POST /run HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 1\\r\\n\\r\\n:' >&3
            read -r version status line <&3; echo $status
        done | uniq
        """,
        out="401\n",
    ),
    Hostile("bombs_by_forking", "bomb() { bomb | bomb & }; bomb; while :; do sleep 1; done", endless=True),
    Hostile("bombs_and_leaves", "bomb() { bomb & bomb & }; bomb; sleep 0.1; exit 3", code=3),
    Hostile("outruns_its_killer_by_forking", "f() { f & }; f & f & f & sleep 1000", endless=True),
    Hostile(
        "has_more_orphans_than_it_may_have_processes",
        "exec 2>&1; for i in {1..90}; do (true &); sleep 0.02; done; echo up",
        out="up\n",
    ),
    Hostile("opens_all_it_can", "while exec {fd}</dev/null; do :; done 2>/dev/null; echo $fd", out="1023\n"),
    Hostile("writes_a_file_without_end", "cat /dev/zero >~/big; echo $?", out="153\n"),
    Hostile("closes_its_pipes", "exec >&- 2>&-; sleep 0.2; exit 5", code=5),
    Hostile(
        "floods_both_pipes", "yes & yes >&2 & wait",
        out=None, endless=True, truncated=True, max_output="100kB",
    ),
    Hostile(
        "prints_one_line_of_twenty_megabytes", "head -c 20000000 /dev/zero | tr '\\0' x",
        out=None, truncated=True, max_output="1MB",
    ),
    Hostile("prints_no_text", "head -c 3000000 /dev/urandom", out=None),
    Hostile("has_others_hold_its_pipes", "(sleep 1000 &); setsid sleep 1000 & exit 4", code=4),
    Hostile("stops_itself", "kill -STOP $$", endless=True),
    Hostile("ignores_signals", "trap '' TERM INT HUP QUIT; while :; do :; done", endless=True),
    Hostile("kills_itself", "kill -9 $$", code=137, signal="SIGKILL"),
    Hostile("has_itself_killed", "(sleep 0.1; kill -9 $$) & sleep 1000", code=137, signal="SIGKILL"),
    Hostile(
        "changes_its_session",
        "setsid --fork bash -c 'trap \"\" TERM HUP INT; while :; do sleep 1; done'; echo up",
        out="up\n",
    ),
    Hostile(
        "hides_in_namespaces",
        "unshare -Urpf --mount-proc bash -c 'setsid sleep 1000 & sleep 1000' & sleep 0.3; exit 3",
        code=3,
    ),
    Hostile("removes_its_home", "rm -rf ~; cd /; exit 3", code=3),
    Hostile("hides_its_name", "echo -n ') R 1 1' >/proc/$$/comm; sleep 1000 & exit 3", code=3),
)  # fmt: skip

# What is tried in bubblewrap, on a machine of this host.
IN_A_SANDBOX = (
    Hostile("kills_all", "kill -9 -1; pkill -9 bwrap; kill -9 1; echo up", out="up\n"),
    Hostile("writes_kernel_files", "mount -o remount,rw /proc/sys 2>/dev/null;" + KERNEL_FILES),
    Hostile("reads_all_environments", f"cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep {SECRET}; :"),
    Hostile(
        "looks_for_its_worker",
        "echo /proc/[0-9]*; (exec 3<>/dev/tcp/127.0.0.1/PORT) 2>/dev/null || exit 3",
        out="/proc/1 /proc/2\n",
        code=3,
    ),
    Hostile("reads_what_is_roots_alone", "head -c 1 /etc/shadow 2>/dev/null || exit 3", code=3),
    Hostile(
        "writes_the_system",
        "for place in / /usr /etc /lib /proc ~; do touch $place/x 2>/dev/null && echo $place; done; :",
        out="/home/worker\n",
    ),
    Hostile("bombs_by_forking", "bomb() { bomb | bomb & }; bomb; while :; do sleep 1; done", endless=True),
    Hostile("changes_its_session", "setsid --fork sleep 1000; (setsid sleep 1000 &); exit 3", code=3),
    Hostile("stops_itself", "kill -STOP -1; kill -STOP $$", endless=True),
    Hostile(
        "digs_deep",
        "p=$(printf 'd/%.0s' {1..1500}); mkdir -p $p && cd -P $p && mkdir -p $p && exit 3",
        code=3,
    ),
    Hostile("locks_its_home", "mkdir -p a/b; mkfifo a/b/f; ln -s / a/l; chmod 0 a/b a .; exit 3", code=3),
)  # fmt: skip

# And without it.
ON_THE_HOST = (
    Hostile("kills_whom_it_can", "kill -9 -1; kill -9 $PPID; echo up", out="up\n"),
    Hostile("changes_its_session", "setsid --fork sleep 1000; (setsid sleep 1000 &); exit 3", code=3),
    Hostile("writes_kernel_files", KERNEL_FILES),
)
