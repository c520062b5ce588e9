"""Tables of hostile scripts, each with a name and the only outcome that it may have."""

from __future__ import annotations

from dataclasses import dataclass

SECRET = "of-the-worker"
"""A value in the worker's environment and in a file that only root can read; no script may print it."""


@dataclass(frozen=True)
class HostileScript:
    """
    A script and the outcome of its run. `out` is its complete standard output, or None for any.

    An `endless` script is killed at its deadline. PORT in the script is the port of its worker, and UID in
    `out` is the id of its user.
    """

    name: str
    script: str
    out: str | None = ""
    code: int = 0
    signal: str | None = None
    endless: bool = False
    oom: bool = False
    truncated: bool = False
    max_output: str = ""
    needs: str = "bash"


KERNEL_FILES = """
for file in sys/kernel/core_pattern sys/vm/swappiness sysrq-trigger; do
    (: >>/proc/$file) 2>/dev/null && echo $file
done; :
"""
"""Opens kernel files for writing, and writes nothing to them."""

# For scripts of any user, including the worker's own.
SNOOPING = (
    HostileScript(
        "reads_its_worker_in_proc",
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
    HostileScript(
        "reads_all_environments",
        f"cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep {SECRET}; :",
    ),
    HostileScript("looks_for_inherited_descriptors", "ls /proc/self/fd | wc -l", out="4\n"),
    HostileScript(
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
)

AS_ANOTHER_USER = (
    *SNOOPING,
    HostileScript(
        "signals_its_worker",
        "for s in KILL STOP TERM INT HUP USR1 ABRT; do kill -$s $PPID 2>/dev/null && echo $s; done; :",
    ),
    HostileScript(
        "kills_its_worker_by_name", "pkill -9 -f 'bfaas[.]basher'; pkill -9 python; echo up", out="up\n"
    ),
    HostileScript("kills_all_processes_of_its_user", "sleep 1000 & kill -9 -1; echo up", out="up\n"),
    HostileScript(
        "stops_all_processes_of_its_user", "sleep 1000 & kill -STOP -1; kill -STOP $$", endless=True
    ),
    HostileScript(
        "raises_the_oom_score_of_its_worker",
        "(echo 1000 >/proc/$PPID/oom_score_adj) 2>/dev/null && echo done; exit 3",
        code=3,
    ),
    HostileScript(
        "lowers_its_own_oom_score",
        "cat /proc/self/oom_score_adj; (echo -1 >/proc/self/oom_score_adj) 2>/dev/null && echo done; exit 3",
        out="1000\n",
        code=3,
    ),
    HostileScript("reads_files_of_root", "cat ~/secret ~/api; exit 3", code=3),
    HostileScript(
        "connects_to_a_socket_of_root",
        "cd; python3 -c 'import socket; socket.socket(1).connect(\"api\"); print(1)'; :",
        needs="python3",
    ),
    HostileScript("uses_groups_of_its_worker", "id -G", out="UID\n"),
    HostileScript("runs_a_setuid_program", "~/setuid -u; ~/setuid -ru", out="UID\nUID\n"),
    HostileScript(
        "raises_its_limits",
        "for limit in c n u f; do ulimit -$limit unlimited 2>/dev/null && echo more; ulimit -$limit; done",
        out="0\n1024\n64\n4096\n",
    ),
    HostileScript("writes_kernel_files", KERNEL_FILES),
    HostileScript(
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
    HostileScript(
        "floods_its_worker_with_connections",
        "for i in {1..200}; do exec {fd}<>/dev/tcp/127.0.0.1/PORT; done; echo $fd",
        out="209\n",
    ),
    HostileScript(
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
    HostileScript(
        "is_a_fork_bomb", "bomb() { bomb | bomb & }; bomb; while :; do sleep 1; done", endless=True
    ),
    HostileScript("leaves_a_fork_bomb", "bomb() { bomb & bomb & }; bomb; sleep 0.1; exit 3", code=3),
    HostileScript("forks_to_escape_from_being_killed", "f() { f & }; f & f & f & sleep 1000", endless=True),
    HostileScript(
        "has_more_orphans_than_its_limit_of_processes",
        "exec 2>&1; for i in {1..90}; do (true &); sleep 0.02; done; echo up",
        out="up\n",
    ),
    HostileScript(
        "opens_as_many_files_as_possible",
        "while exec {fd}</dev/null; do :; done 2>/dev/null; echo $fd",
        out="1023\n",
    ),
    HostileScript("writes_a_file_without_end", "cat /dev/zero >~/big; echo $?", out="153\n"),
    HostileScript("closes_its_pipes", "exec >&- 2>&-; sleep 0.2; exit 5", code=5),
    HostileScript(
        "floods_both_pipes",
        "yes & yes >&2 & wait",
        out=None,
        endless=True,
        truncated=True,
        max_output="100kB",
    ),
    HostileScript(
        "prints_one_line_of_twenty_megabytes",
        "head -c 20000000 /dev/zero | tr '\\0' x",
        out=None,
        truncated=True,
        max_output="1MB",
    ),
    HostileScript("prints_invalid_text", "head -c 3000000 /dev/urandom", out=None),
    HostileScript(
        "leaves_processes_that_hold_its_pipes", "(sleep 1000 &); setsid sleep 1000 & exit 4", code=4
    ),
    HostileScript("stops_itself", "kill -STOP $$", endless=True),
    HostileScript("ignores_signals", "trap '' TERM INT HUP QUIT; while :; do :; done", endless=True),
    HostileScript("kills_itself", "kill -9 $$", code=137, signal="SIGKILL"),
    HostileScript(
        "is_killed_by_its_child", "(sleep 0.1; kill -9 $$) & sleep 1000", code=137, signal="SIGKILL"
    ),
    HostileScript(
        "changes_its_session",
        "setsid --fork bash -c 'trap \"\" TERM HUP INT; while :; do sleep 1; done'; echo up",
        out="up\n",
    ),
    HostileScript(
        "hides_in_namespaces",
        "unshare -Urpf --mount-proc bash -c 'setsid sleep 1000 & sleep 1000' & sleep 0.3; exit 3",
        code=3,
    ),
    HostileScript("removes_its_home", "rm -rf ~; cd /; exit 3", code=3),
    HostileScript("hides_its_name", "echo -n ') R 1 1' >/proc/$$/comm; sleep 1000 & exit 3", code=3),
)

# For scripts in bubblewrap, on local machines.
IN_A_SANDBOX = (
    HostileScript("kills_all_processes", "kill -9 -1; pkill -9 bwrap; kill -9 1; echo up", out="up\n"),
    HostileScript("writes_kernel_files", "mount -o remount,rw /proc/sys 2>/dev/null;" + KERNEL_FILES),
    HostileScript("reads_all_environments", f"cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep {SECRET}; :"),
    HostileScript(
        "looks_for_its_worker",
        "echo /proc/[0-9]*; (exec 3<>/dev/tcp/127.0.0.1/PORT) 2>/dev/null || exit 3",
        out="/proc/1 /proc/2\n",
        code=3,
    ),
    HostileScript("reads_files_of_root", "head -c 1 /etc/shadow 2>/dev/null || exit 3", code=3),
    HostileScript(
        "writes_the_system",
        "for place in / /usr /etc /lib /proc ~; do touch $place/x 2>/dev/null && echo $place; done; :",
        out="/home/worker\n",
    ),
    HostileScript(
        "is_a_fork_bomb", "bomb() { bomb | bomb & }; bomb; while :; do sleep 1; done", endless=True
    ),
    HostileScript("changes_its_session", "setsid --fork sleep 1000; (setsid sleep 1000 &); exit 3", code=3),
    HostileScript("stops_itself", "kill -STOP -1; kill -STOP $$", endless=True),
    HostileScript(
        "creates_a_deep_directory",
        "p=$(printf 'd/%.0s' {1..1500}); mkdir -p $p && cd -P $p && mkdir -p $p && exit 3",
        code=3,
    ),
    HostileScript(
        "removes_permissions_of_its_home",
        "mkdir -p a/b; mkfifo a/b/f; ln -s / a/l; chmod 0 a/b a .; exit 3",
        code=3,
    ),
)

# For scripts on local machines without bubblewrap.
ON_THE_HOST = (
    HostileScript("kills_all_processes_of_its_user", "kill -9 -1; kill -9 $PPID; echo up", out="up\n"),
    HostileScript("changes_its_session", "setsid --fork sleep 1000; (setsid sleep 1000 &); exit 3", code=3),
    HostileScript("writes_kernel_files", KERNEL_FILES),
)
