/**
 * The guest's /init: what the kernel runs from the initramfs. It makes the machine what its configuration
 * says and then either stays (the minimal guest) or hands over to the root's init.
 *
 * @module
 */

import { GUEST_RUN_DIRECTORY } from "./agent.ts";

/**
 * The script to be put at `/init` of the initramfs, beside `/hypertopia/busybox`, `/hypertopia/agent`,
 * `/hypertopia/modules/` and `/hypertopia/config/`.
 *
 * It starts the agent the same way in front of every init: as a process chrooted to the final root before
 * PID 1 goes there, so the guest answers whatever its init is and however far that gets.
 */
export const INIT_SCRIPT: string = `#!/hypertopia/busybox sh
bb=/hypertopia/busybox
run=${GUEST_RUN_DIRECTORY}
export PATH=/bin

say() {
  echo "hypertopia: $*" >/dev/console
}

# Nothing can be asked of a guest that fails here, so it says why on its console and stops.
fail() {
  say "$*"
  sleep 1
  poweroff -f
  sleep 60
}

# find_disk SERIAL: sets device. Disks that have no serial number are in the kernel's command line.
find_disk() {
  for entry in /sys/block/*/serial; do
    # There is no newline at its end, which read takes for a failure.
    serial=
    { read -r serial <"$entry"; } 2>/dev/null
    [ "$serial" = "$1" ] || continue
    entry=\${entry%/serial}
    device=/dev/\${entry##*/}
    return 0
  done
  read -r words </proc/cmdline
  for word in $words; do
    case $word in
      "hypertopia.disk=$1":*) device=/dev/\${word##*:} && [ -b "$device" ] && return 0 ;;
    esac
  done
  return 1
}

# find_device DEVICE: sets device, waiting for one that is still being probed.
find_device() {
  tries=100
  while [ "$tries" -gt 0 ]; do
    case $1 in
      serial=*) find_disk "\${1#serial=}" && return 0 ;;
      *) device=$1 && [ -b "$1" ] && return 0 ;;
    esac
    sleep 0.1
    tries=$((tries - 1))
  done
  return 1
}

load_modules() {
  [ -f /hypertopia/modules/order ] || return 0
  while read -r module only; do
    case $only in '' | "$bus") ;; *) continue ;; esac
    insmod "/hypertopia/modules/$module" || say "module $module was not loaded"
  done </hypertopia/modules/order
  rm -rf /hypertopia/modules
}

# Every NIC gets a name of no other on the way to its own, so that two can swap names; a name given also
# keeps udev from giving another. Where there is none, a name that is right stays: each program that is run costs time.
configure_network() {
  [ -f /hypertopia/config/network ] || return 0
  while read -r mac name rest; do
    for entry in /sys/class/net/*; do
      { read -r address <"$entry/address"; } 2>/dev/null || continue
      [ "$address" = "$mac" ] || continue
      [ -f /hypertopia/config/root ] || [ "\${entry##*/}" != "$name" ] || continue
      ip link set dev "\${entry##*/}" down
      ip link set dev "\${entry##*/}" name "ht.$name"
    done
  done </hypertopia/config/network
  while read -r mac name address gateway dns; do
    if [ -e "/sys/class/net/ht.$name" ]; then
      ip link set dev "ht.$name" name "$name"
    elif ! { read -r found <"/sys/class/net/$name/address"; } 2>/dev/null || [ "$found" != "$mac" ]; then
      say "no network device has the address $mac of $name"
      continue
    fi
    # It can have been configured from without.
    flags=
    { read -r flags <"/sys/class/net/$name/flags"; } 2>/dev/null
    case $flags in *[13579bdf]) continue ;; esac
    ip link set dev "$name" up
    [ "$address" = - ] || ip address add "$address" dev "$name"
    case $gateway in
      -) ;;
      *:*) ip -6 route add default via "$gateway" dev "$name" ;;
      *) ip route add default via "$gateway" dev "$name" ;;
    esac
  done </hypertopia/config/network
}

# prepare: what a guest that stays in the initramfs takes, whoever it is.
prepare() {
  [ -h "$run/bin/busybox" ] && return
  ln -s "$bb" "$run/bin/busybox"
  ln -s /hypertopia/config "$run/config"
  chmod 700 /root
  chmod 1777 /tmp
  echo 'root:x:0:0:root:/root:/bin/sh' >/etc/passwd
  echo 'root:x:0:' >/etc/group
  # What the first process does in the end.
  set --
  . "$run/agent"
  set +f
}

# tell_agent SUBCOMMAND WORD: to the agent that waits to do that, if one does.
tell_agent() {
  [ -p "$run/go.$1" ] || return 1
  echo "$2" >"$run/go.$1"
}

# refuse WORDS: to go on as nobody, or as another machine. The host hears why.
refuse() {
  echo "hypertopia: refused $*" >&3
  fail "$*"
}

# personalize: up to here all machines of a kind are the same, and one may go on from what another one was. The
# host sends an archive. Each program that is run costs time.
personalize() {
  prepare
  # The agent waits for its word, which is worth more than the time that its start takes here.
  mkfifo "$run/go.serve" "$run/go.command" "$run/go.console" "$run/never"
  start_agent wait serve
  start_agent wait command
  start_agent wait console "$console"
  exec 3<>"/dev/$control"
  stty raw -echo <&3
  # It is there already when there is something for it.
  cpio -idu <&3 2>"$run/unpacked" &
  until read -r number name state rest <"/proc/$!/stat" && [ "$name $state" = "(cpio) S" ]; do :; done
  echo "hypertopia: template" >&3
  if ! wait "$!"; then
    reason=
    read -r reason <"$run/unpacked"
    refuse "it could not unpack its configuration and files (\${reason:-no reason was given}): give it more memory, or less to unpack"
  fi
  /hypertopia/personal/wake ||
    refuse "its addresses, clock, random numbers or disks are still those of the machine it was before"
  # What goes on from the state of another machine would show that one's hardware address as the permanent one, which only
  # a driver that starts reads. A guest that stays here has nobody to ask for it.
  if [ -f /hypertopia/config/root ]; then
    for entry in /sys/bus/virtio/drivers/virtio_net/virtio*; do
      [ -e "$entry" ] || continue
      echo "\${entry##*/}" >/sys/bus/virtio/drivers/virtio_net/unbind
      echo "\${entry##*/}" >/sys/bus/virtio/drivers/virtio_net/bind
    done
  fi
  echo "hypertopia: personal" >&3
  exec 3>&-
}

# start_agent SUBCOMMAND...: in the final root, which is PID 1's own for as long as root is empty.
start_agent() {
  # The second setsid, run by a leader, forks: nothing is waited for.
  /bin/chroot "$root/" "$bb" setsid "$bb" setsid "$bb" sh "$run/agent" "$@" \\
    <"$root/dev/null" >"$root/dev/console" 2>&1
}

# systemd gets a unit instead.
start_command() {
  if [ -f "$root$run/config/command" ]; then
    tell_agent command go || start_agent command
  else
    tell_agent command end
  fi
}

# settle: the part of the configuration that is written into the final root, from within it, for its
# symbolic links to mean what they mean there. Programs are run only where there is no other way.
settle() {
  config=$run/config
  if [ -f "$config/mounts" ]; then
    while read -r serial mountpoint type; do
      mkdir -p "$mountpoint"
      if ! find_device "serial=$serial"; then
        say "no disk has the serial number $serial of $mountpoint"
      elif ! mount -t "$type" "$device" "$mountpoint"; then
        say "could not mount $device ($serial) on $mountpoint as $type"
      fi
    done <"$config/mounts"
  fi
  [ -d /etc ] || mkdir -p /etc
  read -r name <"$config/hostname"
  echo "$name" >/etc/hostname
  if ! [ -f /etc/hosts ]; then
    printf '127.0.0.1 localhost\\n::1 localhost ip6-localhost ip6-loopback\\n127.0.1.1 %s\\n' "$name" >/etc/hosts
  elif ! grep -qw -e "$name" /etc/hosts; then
    echo "127.0.1.1 $name" >>/etc/hosts
  fi
  if [ -s "$config/resolv.conf" ]; then
    # It may be a link to what a resolver that does not run would have written.
    [ ! -h /etc/resolv.conf ] || rm -f /etc/resolv.conf
    while IFS= read -r line; do echo "$line"; done <"$config/resolv.conf" >/etc/resolv.conf
  fi
  [ -f "$config/files/list" ] || return 0
  umask 0
  while read -r number mode path; do
    [ -d "\${path%/*}/" ] || (umask 022 && mkdir -p "\${path%/*}/")
    if [ -e "$path" ] || [ -h "$path" ]; then rm -f "$path"; fi
    # It has its permissions from the archive, but for the special ones.
    cp "$config/files/$number" "$path" || say "could not write the file $path"
    case $mode in ????*) chmod "$mode" "$path" ;; esac
  done <"$config/files/list"
  umask 022
}

# systemd finds these in /run: nothing of them is left in the root.
systemd_units() {
  units=/run/systemd/system
  mkdir -p "$units/multi-user.target.wants" /run/systemd/system-environment-generators
  # systemd starts a login on every virtual console it sees, but this one is the control line.
  ln -s /dev/null "$units/serial-getty@$control.service"
  if [ -s "$run/config/environment.systemd" ]; then
    generator=/run/systemd/system-environment-generators/90-hypertopia
    printf '#!%s/bin/busybox sh\\n%s/bin/busybox cat %s/config/environment.systemd\\n' \\
      "$run" "$run" "$run" >"$generator"
    chmod 755 "$generator"
  fi
  if [ -f "$run/config/command" ]; then
    cat >"$units/hypertopia-command.service" <<END
[Unit]
Description=Command of this Hypertopia machine
After=basic.target network.target

[Service]
ExecStart=$run/bin/busybox sh $run/agent command
StandardOutput=journal+console
StandardError=journal+console
END
    ln -s ../hypertopia-command.service "$units/multi-user.target.wants/hypertopia-command.service"
  fi
}

# settle INIT CONTROL: PID 1 calls this script again, within the final root.
if [ "$1" = settle ] && [ "$$" != 1 ]; then
  PATH=$run/bin:$PATH
  settle
  rm -rf "$run/config/files"
  mode=other
  case $(readlink -f "$2") in
    */systemd) mode=systemd && control=$3 && systemd_units ;;
  esac
  echo "$mode" >"$run/mode"
  exit 0
fi

"$bb" mkdir -p /proc /sys /dev /run /tmp /bin /etc /root
"$bb" mount -t proc -o nosuid,nodev,noexec proc /proc
"$bb" mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
"$bb" mount -t devtmpfs -o nosuid,mode=755 devtmpfs /dev
"$bb" mkdir -p /dev/pts /dev/shm
"$bb" mount -t devpts -o nosuid,noexec,mode=620,gid=5,ptmxmode=666 devpts /dev/pts
"$bb" mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /dev/shm
"$bb" mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs /run
"$bb" --install -s /bin

root=
mkdir -p "$run/bin"
cp /hypertopia/agent "$run/agent"
cp /init "$run/init"

bus=virtio
control=hvc0
console=
template=
read -r words </proc/cmdline
for word in $words; do
  case $word in
    # Only a guest of Xen has its channels there; a first domain has the devices of another engine.
    hypertopia.channels=*) bus=xen ;;
    hypertopia.control=*) control=\${word#*=} ;;
    hypertopia.template) template=yes ;;
  esac
done

load_modules
ip link set dev lo up

if read -r words </sys/class/tty/console/active; then
  for word in $words; do
    [ "$word" = "$control" ] || console=$word
  done
fi

[ -z "$template" ] || personalize

read -r name </hypertopia/config/hostname
echo "$name" >/proc/sys/kernel/hostname
configure_network

if ! [ -f /hypertopia/config/root ]; then
  prepare
  settle
  echo minimal >"$run/mode"
  tell_agent serve go || start_agent serve
  start_command
  if [ -n "$template" ]; then
    # The machine is wanted at once; the rest can wait for a moment, which takes no program. Nobody else has that pipe open:
    # one that the agent waits for would end for it here.
    {
      read -r -t 1 word <>"$run/never"
      tell_agent console go
      rm -rf "$run/config/files"
    } &
    console=
  else
    rm -rf "$run/config/files"
  fi
  first "$console"
fi

rm -f "$run/config"
cp -R /hypertopia/config "$run/config"
read -r wanted type init <"$run/config/root"
root=/newroot
mkdir -p "$root"
find_device "$wanted" || fail "no root device $wanted"
mount -t "$type" -o rw "$device" "$root" || fail "could not mount the root device $device as $type"
[ -e "$root$init" ] || [ -h "$root$init" ] || fail "no init $init on the root device $device"

tell_agent serve end
tell_agent command end
tell_agent console end
rm -f "$run/bin/busybox"
cp "$bb" "$run/bin/busybox"
for directory in dev proc sys run; do
  mkdir -p "$root/$directory"
  mount --move "/$directory" "$root/$directory"
done
bb=$run/bin/busybox
# Without /proc the shell finds its own applets by their links only.
/bin/chroot "$root" "$bb" --install -s "$run/bin"
/bin/chroot "$root" "$bb" sh "$run/init" settle "$init" "$control"
start_agent serve
read -r mode <"$root$run/mode"
[ "$mode" = other ] && start_command
exec switch_root "$root" "$init"
`;
