/**
 * The guest's agent: a POSIX shell script run by the static busybox every Hypertopia guest carries.
 *
 * It serves one-line requests on the control line (a virtconsole tty, on which a read blocks without
 * polling) and starts one session a request on a pair of virtio-serial ports:
 *
 * - `hypertopia.K` carries the command's input (framed) to the guest and its output (raw) back;
 * - `hypertopia.K.err` carries its error output back; the guest reads it only to learn that the host left.
 *
 * Where there is no virtio, each of them is a console, which is a terminal to the guest. It differs from a port:
 *
 * - It keeps what nobody has read. So after the mark of the start, the host sends a line with the session's token on both,
 *   and what the guest reads before that is of an earlier session.
 * - It has no end: a line "leave" on the console for error output says that the host left (Linux 6.1
 *   `drivers/tty/hvc/hvc_xen.c`).
 * - A vCPU that writes to a full console stops until there is room (`domU_write_console()` there). So the guest has no more
 *   than two times {@linkcode CONSOLE_BLOCK} of output on the way: for each block that the host has taken, it sends an empty
 *   line on the console for error output.
 *
 * @module
 */

/** Version of the protocol spoken between the agent and the host, as `ping` reports it. */
export const AGENT_VERSION = "1";

/** In the place of a request's id: what the agent says when it begins to listen, as if it had been asked whether it is there. */
export const AGENT_GREETING = "hello";

/** Directory of a guest's run-time files, on a tmpfs in every kind of guest. */
export const GUEST_RUN_DIRECTORY = "/run/hypertopia";

/** Path of the static busybox in every running guest. */
export const GUEST_BUSYBOX: string = `${GUEST_RUN_DIRECTORY}/bin/busybox`;

/** Text that marks the start of a session's output on both of its ports, before the session's token. */
export const READY_MARK = "\x1ehypertopia-ready ";

/** Text that marks the end of a session's output on both of its ports, before the token and the status. */
export const END_MARK = "\x1ehypertopia-end ";

/** How much of a session's output on a console goes between two words of the host's that it goes on, in bytes. */
export const CONSOLE_BLOCK = 32_768;

/** Search path of a guest whose environment sets none. */
export const GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/**
 * The agent's script, kept in a guest at `/run/hypertopia/agent`.
 *
 * Its subcommands: `serve` (the control line), `session` (one command), `end` (ends what a session left),
 * `halt` (stops the machine), `first` (PID 1 of the minimal guest), `console` and `shell` (its root shell),
 * `command` (the machine's own command).
 */
export const AGENT_SCRIPT: string = `#!${GUEST_BUSYBOX} sh
# Names start with ht_ because the machine's environment is loaded into the same shell.
ht_run=${GUEST_RUN_DIRECTORY}
ht_bb=${GUEST_BUSYBOX}
ht_agent=$ht_run/agent
set -f

# detach ARGUMENTS: starts the agent anew in a session of its own, as a child of PID 1. The second setsid,
# run by the leader the first has made, forks. Commands put into the background with & would be deaf to
# SIGINT, and all that they start.
detach() {
  "$ht_bb" setsid "$ht_bb" setsid "$ht_bb" sh "$ht_agent" "$@"
}

load_environment() {
  PATH=${GUEST_PATH} HOME=/root USER=root LOGNAME=root
  export PATH HOME USER LOGNAME
  [ -f "$ht_run/config/environment" ] || return 0
  set -a
  . "$ht_run/config/environment"
  set +a
}

# signal_session SIGNAL SID: signals all of a session's processes, whatever groups a shell in it made;
# fails when there are none. A zombie has ended already.
signal_session() {
  ht_found=1
  set +f
  for ht_stat in /proc/[0-9]*/stat; do
    { IFS= read -r ht_line <"$ht_stat"; } 2>/dev/null || continue
    ht_pid=\${ht_line%% *}
    set -f -- "$1" "$2" \${ht_line##*) }
    [ "$6" = "$2" ] && [ "$3" != Z ] && [ "$3" != X ] || continue
    kill -"$1" "$ht_pid" 2>/dev/null && ht_found=0
  done
  set -f
  return "$ht_found"
}

# end_session SID: asks a session's processes to end, and makes them after a grace time.
end_session() {
  signal_session TERM "$1" || return 0
  kill -CONT "-$1" 2>/dev/null
  ht_left=10
  while [ "$ht_left" -gt 0 ]; do
    sleep 0.2
    signal_session 0 "$1" || return 0
    ht_left=$((ht_left - 1))
  done
  while signal_session KILL "$1"; do sleep 0.05; done
}

# find_port NAME: sets ht_port to the device of a virtio-serial port (links in /dev are udev's work,
# which a guest may not have), or of the console in its place.
find_port() {
  if [ -n "$ht_channels" ]; then
    ht_name=\${1#hypertopia.}
    ht_port=$((ht_channels + 2 * \${ht_name%.err}))
    case $ht_name in *.err) ht_port=$((ht_port + 1)) ;; esac
    ht_port=/dev/hvc$ht_port
    [ -c "$ht_port" ]
    return
  fi
  set +f
  for ht_entry in /sys/class/virtio-ports/*; do
    { IFS= read -r ht_name <"$ht_entry/name"; } 2>/dev/null || continue
    [ "$ht_name" = "$1" ] || continue
    set -f
    ht_port=/dev/\${ht_entry##*/}
    return 0
  done
  set -f
  return 1
}

# forget_session K: ends what an earlier client's session left on a channel.
forget_session() {
  ht_group= ht_user=
  # The session may be removing it, too.
  { read -r ht_group ht_user <"$ht_run/session.$1"; } 2>/dev/null || return 0
  rm -f "$ht_run/session.$1" 2>/dev/null
  [ -n "$ht_user" ] && signal_session TERM "$ht_user"
  [ -n "$ht_group" ] && kill -KILL "-$ht_group" 2>/dev/null
  [ -z "$ht_user" ] || detach end "$ht_user" </dev/null >/dev/null 2>&1 3>&-
}

session_alive() {
  ht_group=
  { read -r ht_group ht_user <"$ht_run/session.$1"; } 2>/dev/null && kill -0 "-$ht_group" 2>/dev/null
}

open_channel() {
  case $1 in '' | *[!0-9]*) reply "error no channel $1" && return ;; esac
  find_port "hypertopia.$1" || { reply "error no port hypertopia.$1" && return; }
  ht_data=$ht_port
  find_port "hypertopia.$1.err" || { reply "error no port hypertopia.$1.err" && return; }
  forget_session "$1"
  if [ -n "$ht_channels" ]; then
    # They are opened here, by a process that leads no session: one that does would get them for its terminal.
    printf '%s\\n' "$2" | detach session "$1" 4<>"$ht_data" 5<>"$ht_port" 3>&- ||
      { reply "error no console $ht_data or $ht_port" && return; }
    reply ok tty
    return
  fi
  # The token goes by a pipe for it must show in no command line.
  printf '%s\\n' "$2" | detach session "$1" "$ht_data" "$ht_port" 3>&-
  reply ok
}

# Other processes than PID 1, the kernel's and this one.
others_left() {
  read -r ht_self ht_rest </proc/self/stat
  set +f
  for ht_stat in /proc/[0-9]*/stat; do
    { IFS= read -r ht_line <"$ht_stat"; } 2>/dev/null || continue
    ht_pid=\${ht_line%% *}
    set -f -- \${ht_line##*) }
    case $1 in Z | X) continue ;; esac
    case $ht_pid in 1 | 2 | "$ht_self") continue ;; esac
    [ "$2" = 2 ] || return 0
  done
  set -f
  return 1
}

# halt_now VERB: for a guest whose PID 1 would not stop the machine by itself.
halt_now() {
  sync
  kill -TERM -1
  kill -HUP -1
  kill -CONT -1
  ht_left=30
  while [ "$ht_left" -gt 0 ] && others_left; do
    sleep 0.1
    ht_left=$((ht_left - 1))
  done
  kill -KILL -1
  sync
  # A file that is open keeps its file system: what comes after is in it.
  "$ht_bb" umount -a -r 2>/dev/null 3<"$ht_agent"
  sync
  "$ht_bb" "$1" -f
}

# stop VERB: PID 1's answer to the signals busybox's poweroff, halt and reboot send it.
stop() {
  [ -z "$ht_halting" ] || return 0
  ht_halting=1
  (halt_now "$1") &
  ht_stopper=$!
}

# first CONSOLE: PID 1 of the minimal guest, which reaps, as every wait of the shell does. (busybox init would
# wake up each second.)
first() {
  ht_halting=
  trap 'stop poweroff' USR1 USR2
  trap 'stop reboot' TERM INT
  [ ! -c "/dev/$1" ] || detach console "$1"
  while [ -z "$ht_halting" ]; do
    sleep 86400 &
    wait "$!"
  done
  wait "$ht_stopper"
}

# console NAME: a root shell on the console, and another when it ends.
console() {
  while :; do
    "$ht_bb" setsid -c "$ht_bb" sh "$ht_agent" shell <>"/dev/$1" >&0 2>&1
    sleep 1
  done
}

# halt VERB: orderly.
halt() {
  read -r ht_mode <"$ht_run/mode"
  case $ht_mode in
    minimal)
      if [ "$1" = reboot ]; then kill -TERM 1; else kill -USR2 1; fi
      return
      ;;
    systemd)
      # The signals that start systemd's poweroff.target and reboot.target need no bus; one sent before
      # systemd listens is lost.
      ht_signal=38
      [ "$1" = reboot ] && ht_signal=39
      while :; do
        kill -"$ht_signal" 1
        sleep 10
      done
      ;;
    other)
      # With the root's own command, and without it when that does not stop the machine.
      load_environment
      /bin/sh -c "exec $1" </dev/null >/dev/null 2>&1 && sleep 30
      ;;
  esac
  halt_now "$1"
}

reply() {
  printf '%s\\n' "$ht_id $*" >&3
}

greet() {
  read -r ht_up ht_rest </proc/uptime
  reply "ok ${AGENT_VERSION} $ht_boot $ht_up"
}

# A line is "ID VERB ARGUMENTS"; a dead client's half line fails these checks or is answered to nobody.
handle() {
  ht_id=$1
  case $1 in '' | *[!0-9a-f]*) return ;; esac
  case $2 in
    ping)
      greet
      ;;
    open) open_channel "$3" "$4" ;;
    check)
      if session_alive "$3"; then reply "ok alive"; else reply "ok gone"; fi
      ;;
    poweroff | reboot)
      reply ok
      detach halt "$2" </dev/null 3>&-
      ;;
    *) reply "error unknown request $2" ;;
  esac
}

# await_word NAME: where this was started ahead of what it is for, waits until it may go on.
await_word() {
  [ -n "$ht_waits" ] || return 0
  ht_waits= ht_word=
  read -r ht_word <"$ht_run/go.$1"
  [ "$ht_word" = go ] || exit 0
}

control_line() {
  stty raw -echo <&3
  await_word serve
  # Not before: it is made when it is read first, and machines that go on from one state are not one.
  read -r ht_boot </proc/sys/kernel/random/boot_id
  ht_id=${AGENT_GREETING}
  greet
  while IFS= read -r ht_line <&3; do
    handle $ht_line
  done
}

serve() {
  ht_control=/dev/hvc0
  read -r ht_line </proc/cmdline
  for ht_word in $ht_line; do
    case $ht_word in
      hypertopia.control=*) ht_control=/dev/\${ht_word#*=} ;;
      hypertopia.channels=hvc*) ht_channels=\${ht_word#*=hvc} ;;
    esac
  done
  # As the leader of its session it gets the line for a terminal, whose end is to be survived.
  trap : HUP
  # The guest can still be asked when it runs out of memory; session resets this for commands.
  echo -900 >/proc/self/oom_score_adj
  cd /
  while :; do
    [ -c "$ht_control" ] && control_line 3<>"$ht_control"
    sleep 1
  done
}

pump() {
  if [ -z "$ht_is_console" ]; then
    dd bs=32k status=none
    return
  fi
  pump_block
  # Two blocks are on the way, so that the host need not wait for the next.
  while pump_block && read -r ht_line <&8; do :; done
}

pump_block() {
  dd bs=32k count=${CONSOLE_BLOCK} iflag=count_bytes status=none
}

# skip_to_token FD: reads what is left of earlier sessions.
skip_to_token() {
  while read -r ht_line <&"$1"; do
    [ "$ht_line" != "$ht_token" ] || return 0
  done
}

# Input comes in frames of "SIZE COUNT" and as many blocks, "0 0" being its end.
feed() {
  while read -r ht_size ht_count <&4; do
    [ "$ht_size" -gt 0 ] || return 0
    dd bs="$ht_size" count="$ht_count" iflag=fullblock status=none <&4 || return 0
  done
  # The host left: the command is to be ended, never to take that for the end of its input.
  sleep 86400
}

# Run by a shell in the command's own session: the name the command is given is kept.
ht_exec='exec -a "$0" "$@"'

# find_program NAME PATH: sets ht_program. By hand because busybox prefers its own applets to the root's
# programs of the same name.
find_program() {
  ht_program=$1
  case $1 in
    */*) ;;
    *)
      IFS=:
      for ht_directory in $2; do
        ht_program=\${ht_directory:-.}/$1
        [ -f "$ht_program" ] && [ -x "$ht_program" ] && break
        ht_program=
      done
      unset IFS
      ;;
  esac
  if [ -z "$1" ] || [ -z "$ht_program" ] || ! [ -e "$ht_program" ]; then
    echo "$1: not found" >&2
    return 127
  fi
  if [ -d "$ht_program" ] || ! [ -x "$ht_program" ]; then
    echo "$1: not executable" >&2
    return 126
  fi
}

# enter DIRECTORY
enter() {
  cd -- "$1" 2>/dev/null && return 0
  echo "could not change to the directory $1" >&2
  exit 126
}

# The command's parent: reports its status within its output, in order after all the command wrote.
launch() {
  # The shell's own remarks on how a command ended are not of the command.
  exec 4>&- 5>&- 7>&2 8<&- 2>/dev/null
  (
    # Noted by the process itself: no client can leave between its start and the note.
    read -r ht_self ht_rest </proc/self/stat
    echo "$$ $ht_self" >"$ht_run/session.$ht_channel"
    echo 0 >/proc/self/oom_score_adj
    unset ht_token
    eval "$ht_script"
  ) 2>&7 7>&-
  ht_status=$?
  # What the command left running is its own affair from now on.
  echo "$$" >"$ht_run/session.$ht_channel"
  printf '\\036hypertopia-end %s %s\\n' "$ht_token" "$ht_status"
  printf '\\036hypertopia-end %s %s\\n' "$ht_token" "$ht_status" >&7
}

# Ends the session when the host leaves, which is what ends the reading. On a port, nothing is sent; on a console, also
# that output may go on, which is passed on to the pumps.
watch_host() {
  trap '' PIPE
  [ -z "$ht_is_console" ] || skip_to_token 5
  while read -r ht_line <&5 && [ "$ht_line" != leave ]; do echo; done
  # Without the file the agent leaves this group alone, whose number may soon be another's.
  ht_group= ht_user=
  read -r ht_group ht_user <"$ht_run/session.$ht_channel" && [ "$ht_group" = "$$" ] &&
    rm -f "$ht_run/session.$ht_channel"
  [ -z "$ht_user" ] || exec "$ht_bb" setsid "$ht_bb" sh "$ht_agent" end "$ht_user" "$$" >/dev/null 4>&- 5>&-
  kill -KILL "-$$"
}

run_session() {
  exec 8<&0
  [ -z "$ht_is_console" ] || skip_to_token 4
  read -r ht_size ht_input <&4 || return 0
  ht_script=$(dd bs="$ht_size" count=1 iflag=fullblock status=none <&4)
  {
    if [ "$ht_input" = 1 ]; then
      feed | launch
    else
      launch </dev/null
    fi 2>&6 6>&- | pump >&4 6>&-
  } 6>&1 | pump >&5
}

session_ports() {
  printf '\\036hypertopia-ready %s\\n' "$ht_token" >&4
  printf '\\036hypertopia-ready %s\\n' "$ht_token" >&5
  watch_host | run_session
  # Only the host's leaving ends a session.
  sleep 86400
}

# session_consoles: on consoles, which are open already.
session_consoles() {
  # They open as often as one likes: whoever reads them for the session before must be gone.
  ht_before=
  read -r ht_before <"$ht_run/console.$ht_channel"
  echo "$$" >"$ht_run/console.$ht_channel"
  ht_left=100
  # The first question is cheap, and does not tell what has ended from what nobody has waited for.
  while [ -n "$ht_before" ] && kill -0 "-$ht_before" && signal_session 0 "$ht_before" && [ "$ht_left" -gt 0 ]; do
    ht_left=$((ht_left - 1))
    sleep 0.05
  done
  stty raw -echo <&4
  stty raw -echo <&5
  session_ports
}

# session K [DATA_PORT ERROR_PORT]: leads a process group of all that uses the ports, so that one signal
# frees them.
session() {
  ht_channel=$1
  read -r ht_token
  exec </dev/null 2>/dev/null
  echo "$$" >"$ht_run/session.$1"
  load_environment
  cd /
  unset OLDPWD
  umask 022
  if [ -z "$2" ]; then
    ht_is_console=yes
    session_consoles
    return
  fi
  ht_left=50
  # A port opens once at a time; the one before may still be closing.
  until session_ports 4<>"$2" 5<>"$3"; do
    ht_left=$((ht_left - 1))
    [ "$ht_left" -gt 0 ] || break
    sleep 0.05
  done
}

ht_waits= ht_channels= ht_is_console=
[ "$1" != wait ] || { ht_waits=yes && shift; }
case $1 in
  serve) serve ;;
  first) first "$2" ;;
  console)
    await_word console
    console "$2"
    ;;
  session) session "$2" "$3" "$4" ;;
  end)
    # First the command: it must not take the end of the ports for the end of its input.
    signal_session TERM "$2"
    [ -z "$3" ] || kill -KILL "-$3" 2>/dev/null
    end_session "$2"
    ;;
  halt) halt "$2" ;;
  command)
    await_word command
    load_environment
    cd /
    ht_shell=/bin/sh
    [ -x "$ht_shell" ] || ht_shell="$ht_bb sh"
    exec $ht_shell "$ht_run/config/command"
    ;;
  shell)
    load_environment
    cd /root 2>/dev/null || cd /
    exec -a -sh "$ht_bb"
    ;;
esac
`;
