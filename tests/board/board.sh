#!/usr/bin/env bash
# An emulated ARM board reached over ssh on loopback, for tests of correctness. Its speed says nothing about ARM.
#
#   board.sh start  [--name N] [--arch arm64|armhf] [--cpu MODEL]   build what is missing, start, print the device profile
#   board.sh stop   [--name N]      end it: no process and no mount is left
#   board.sh status [--name N]      exit code 0 while it runs, 3 otherwise
#   board.sh ssh    [--name N] ...  run a command there
#   board.sh image  [--arch A]      build only: Debian bookworm with Python, numpy and the runtimes
#   board.sh clean                  stop all boards and delete the cache folder
#
# One image per architecture lies in the cache folder; any number of boards run from it at once, each with its own CPU
# model, port, home folder (in memory) and simulated sensors. An sshd of the board's architecture runs under qemu's user
# emulation in a chroot, inside user, mount and process namespaces of its own. The rule that makes the kernel hand ARM
# programs to qemu is registered in that user namespace only, which Linux allows from 6.7 on. Must be started as root.
#
#   EDGECNN_BOARD_CACHE   cache folder; default: edgecnn-board in XDG_CACHE_HOME or ~/.cache
#   EDGECNN_BOARD_PYTHON  Python whose pip fetches the wheels; default: python3
#   EDGECNN_BOARD_MIRROR  Debian mirror; default: the one in this machine's apt sources
set -euo pipefail

SUITE=bookworm
PYTHON_VERSION=3.11
GLIBC_MINOR=36
USER_NAME=pi
USER_ID=1000

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script=$here/$(basename "${BASH_SOURCE[0]}")
cache=${EDGECNN_BOARD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgecnn-board}
name=pi4 arch=arm64 cpu=""

say() { printf 'board: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
unavailable() { say "$*"; exit 69; }  # not our fault: this machine, or what it downloads from, cannot give it

# What depends on the architecture; also the folders of this image and this board.
settle() {
  case $arch in
    arm64) qemu=aarch64 platform=aarch64 libraries=aarch64-linux-gnu cpu=${cpu:-cortex-a72} extra_packages=""
           wheels=(numpy onnxruntime ai-edge-litert) pip_options=(-c "$here/../../constraints.txt") ;;
    armhf) qemu=arm platform=armv7l libraries=arm-linux-gnueabihf cpu=${cpu:-cortex-a15} extra_packages=,python3-numpy
           wheels=(tflite-runtime==2.14.0) pip_options=(--no-deps) ;;  # numpy: Debian's 1.24, there is no wheel
    *) fail "--arch is '$arch', expected arm64 or armhf" ;;
  esac
  case $arch:$cpu in armhf:*) isa=armv7l ;; *:cortex-a76) isa=aarch64-dotprod ;; *) isa=aarch64 ;; esac
  [[ $name =~ ^[A-Za-z0-9_-]+$ ]] || fail "--name is '$name', expected letters, digits, '_' and '-'"
  image=$cache/$arch-$SUITE root=$cache/$arch-$SUITE/root board=$cache/boards/$name
}

install_tools() {
  local missing=() entry
  for entry in debootstrap:debootstrap "qemu-$qemu-static:qemu-user-static" sshd:openssh-server ssh:openssh-client; do
    command -v "${entry%%:*}" >/dev/null || missing+=("${entry##*:}")
  done
  [ ${#missing[@]} -eq 0 ] && return
  say "installing ${missing[*]}"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >"$cache/apt.log" 2>&1 || unavailable "cannot install ${missing[*]}: $(tail -n 1 "$cache/apt.log")"
}

mirror() {
  local found=${EDGECNN_BOARD_MIRROR:-}
  [ -n "$found" ] || found=$(apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' \
    | awk '$1 == "Debian" && $2 !~ /-/ {print $3; exit}')
  [ -n "$found" ] || unavailable "apt knows no Debian mirror: run apt-get update, or set EDGECNN_BOARD_MIRROR"
  printf '%s\n' "$found"
}

# Debian packages are unpacked and no more: running their scripts under emulation takes minutes. What the scripts would
# have made and Python and sshd need is made here.
build_root() {
  local from archive library
  from=$(mirror)
  rm -rf --one-file-system "$root"
  mkdir -p "$root"
  debootstrap --foreign --variant=minbase --arch="$arch" \
    --include="python3,openssh-server,openssh-sftp-server$extra_packages" "$SUITE" "$root" "$from" \
    >"$image/debootstrap.log" 2>&1 || unavailable "debootstrap failed: $(tail -n 1 "$image/debootstrap.log")"
  for archive in "$root"/var/cache/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$archive" | tar -x -C "$root" --keep-directory-symlink  # /bin is a link to /usr/bin
    rm "$archive"
  done
  rm -rf "$root/debootstrap" "$root/proc"  # proc is a link to the host's here: a mount on it would land there
  mkdir -p "$root"/{proc,sys,dev,run,home,tmp,etc/board}
  ln -sfn dash "$root/usr/bin/sh"
  for library in "$root/usr/lib/$libraries"/{blas,lapack}/*.so.3; do  # Debian chooses among several by a script
    [ ! -e "$library" ] || ln -sfn "${library#"$root/usr/lib/$libraries/"}" "$root/usr/lib/$libraries/${library##*/}"
  done
  printf '%s\n' 'root:*:0:0:root:/root:/bin/bash' 'nobody:*:65534:65534:nobody:/:/usr/sbin/nologin' \
    'sshd:*:105:65534::/run/sshd:/usr/sbin/nologin' "$USER_NAME:*:$USER_ID:$USER_ID::/home/$USER_NAME:/bin/bash" \
    >"$root/etc/passwd"
  printf '%s\n' root:x:0: tty:x:5: video:x:44: nogroup:x:65534: "$USER_NAME:x:$USER_ID:" >"$root/etc/group"
  printf '%s\n' 'passwd: files' 'group: files' 'hosts: files' >"$root/etc/nsswitch.conf"
  echo '127.0.0.1 localhost' >"$root/etc/hosts"
  install -m 755 "$here/vcgencmd.sh" "$root/usr/bin/vcgencmd"
}

install_wheels() {
  local target=$root/usr/local/lib/python$PYTHON_VERSION/dist-packages options=() minor
  for ((minor = 17; minor <= GLIBC_MINOR; minor++)); do options+=(--platform "manylinux_2_${minor}_$platform"); done
  rm -rf "$target"
  "${EDGECNN_BOARD_PYTHON:-python3}" -m pip install -q --target "$target" --implementation cp \
    --python-version "$PYTHON_VERSION" --only-binary=:all: --platform "manylinux2014_$platform" "${options[@]}" \
    "${pip_options[@]}" "${wheels[@]}" >"$image/pip.log" 2>&1 || unavailable "pip failed: $(tail -n 1 "$image/pip.log")"
  chown -R "$USER_ID:$USER_ID" "$target"  # where bytecode is missing the board's user may add it
}

build_image() {
  [ "$(id -u)" = 0 ] || unavailable "must be started as root: the image's files belong to several users"
  mkdir -p "$image"
  exec 9>"$cache/lock"
  flock -w 900 9 || fail "another build holds $cache/lock"
  install_tools
  local started=$SECONDS stamp process
  stamp=$({
    declare -f settle build_root install_wheels
    cat "$here/vcgencmd.sh"
    grep -E '^(numpy|onnxruntime|ai-edge-litert)=' "$here/../../constraints.txt"
  } | sha256sum)
  if [ "$(cat "$image/stamp" 2>/dev/null)" != "$stamp" ]; then
    for process in /proc/[0-9]*/root; do
      [ "$(readlink "$process" || true)" != "$root" ] || fail "a board runs from $root, which is out of date: stop it first"
    done
    rm -f "$image/stamp"
    build_root
    install_wheels
    echo "$stamp" >"$image/stamp"
    say "built $root in $((SECONDS - started)) s, $(du -sm "$root" | cut -f 1) MiB"
  fi
  exec 9>&-
}

# Runs as root of the new namespaces. Whatever a board changes lies in these file systems, which go with it.
inside() {
  local device
  mount -t proc proc /proc
  mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  grep -v '^#' "/usr/lib/binfmt.d/qemu-$qemu.conf" >/proc/sys/fs/binfmt_misc/register
  mount -t proc proc "$root/proc"
  for device in dev run home tmp sys etc/board; do mount -t tmpfs -o mode=755,size=1g board "$root/$device"; done
  chmod 1777 "$root/tmp"
  for device in null zero full random urandom; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
  done
  ln -s /proc/self/fd "$root/dev/fd"
  mkdir -p "$root/dev/"{pts,shm} "$root/run/sshd" "$root/home/$USER_NAME/small"
  mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts "$root/dev/pts"
  ln -s pts/ptmx "$root/dev/ptmx"
  mount -t tmpfs -o mode=1777 board "$root/dev/shm"
  mount -t tmpfs -o "size=256k,mode=755,uid=$USER_ID,gid=$USER_ID" board "$root/home/$USER_NAME/small"  # a full disk
  "$here/hardware.sh" "$root" "$arch" "$cpu"
  mount --bind "$root/etc/board/cpuinfo" "$root/proc/cpuinfo"
  install -m 600 "$board/hostkey" "$root/etc/board/hostkey"
  install -m 644 "$board/key.pub" "$root/etc/board/authorized_keys"
  install -m 644 "$board/sshd_config" "$root/etc/board/sshd_config"
  chown "$USER_ID:$USER_ID" "$root/home/$USER_NAME"
  exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin QEMU_CPU="$cpu" \
    /usr/sbin/sshd -D -e -f /etc/board/sshd_config
}

configure() {
  local port=$1
  mkdir -p "$board"
  [ -f "$board/key" ] || ssh-keygen -q -t ed25519 -N '' -C edgecnn-board -f "$board/key"
  [ -f "$board/hostkey" ] || ssh-keygen -q -t ed25519 -N '' -C edgecnn-board -f "$board/hostkey"
  printf '%s\n' "Port $port" 'ListenAddress 127.0.0.1' 'HostKey /etc/board/hostkey' 'PidFile none' 'UsePAM no' \
    'AuthorizedKeysFile /etc/board/authorized_keys' 'PasswordAuthentication no' 'KbdInteractiveAuthentication no' \
    'PermitRootLogin no' 'PrintMotd no' 'MaxStartups 50' "SetEnv QEMU_CPU=$cpu LC_ALL=C.UTF-8" \
    'Subsystem sftp /usr/lib/openssh/sftp-server' >"$board/sshd_config"
  printf '[127.0.0.1]:%s %s\n' "$port" "$(cut -d ' ' -f 1,2 "$board/hostkey.pub")" >"$board/known_hosts"
  printf '%s\n' 'Host board' '  HostName 127.0.0.1' "  Port $port" "  User $USER_NAME" "  IdentityFile $board/key" \
    '  IdentitiesOnly yes' '  IdentityAgent none' "  UserKnownHostsFile $board/known_hosts" \
    '  GlobalKnownHostsFile /dev/null' '  StrictHostKeyChecking yes' '  LogLevel ERROR' >"$board/ssh_config"
  printf '%s = "%s"\n' name "$name" description "Emulated board ($cpu, $arch): for correctness, not for speed" \
    transport ssh host board ssh_config "$board/ssh_config" python python3 workdir "/home/$USER_NAME" \
    runtime litert isa "$isa" >"$board/$name.toml"
}

free_port() { "${EDGECNN_BOARD_PYTHON:-python3}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# The pid of this board's `unshare`, if it lives: pids are used again, so its command line must name the board.
running_pid() {
  local pid
  pid=$(cat "$board/pid" 2>/dev/null) || return 1
  tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q "^unshare .* --name $name " || return 1
  echo "$pid"
}

answers() { ssh -F "$board/ssh_config" -o BatchMode=yes -o ConnectTimeout=20 board true 2>/dev/null; }

start() {
  if running_pid >/dev/null && answers; then
    echo "$board/$name.toml"
    return
  fi
  stop
  build_image
  configure "$(free_port)"
  # A program started before its ids are mapped would lose its privileges: the shell waits, then starts the script.
  unshare --user --mount --propagation private --pid --fork --kill-child -- \
    bash -c 'until read -r _ </proc/self/uid_map; do sleep 0.01; done 2>/dev/null; exec "$@"' board \
    "$script" inside --name "$name" --arch "$arch" --cpu "$cpu" </dev/null >"$board/log" 2>&1 &
  local pid=$! tries
  echo "$pid" >"$board/pid"
  for ((tries = 0; tries < 200; tries++)); do
    [ "$(readlink "/proc/$pid/ns/user" 2>/dev/null)" = "$(readlink /proc/self/ns/user)" ] || break
    sleep 0.02
  done
  { echo '0 0 65536' >"/proc/$pid/gid_map" && echo '0 0 65536' >"/proc/$pid/uid_map"; } 2>/dev/null || {
    stop
    unavailable "no user namespace of its own: $(tail -n 1 "$board/log")"
  }
  disown "$pid"
  for ((tries = 0; tries < 100; tries++)); do
    [ -d "/proc/$pid" ] || break
    if grep -q 'Server listening' "$board/log" && answers; then
      say "$name ($arch, $cpu) is up, pid $pid"
      echo "$board/$name.toml"
      return
    fi
    sleep 0.1
  done
  stop
  fail "the board did not come up: $(tail -n 1 "$board/log") (all of it: $board/log)"
}

# Ends the first process of the board's namespace; the kernel ends the rest and drops the mounts.
stop() {
  local pid first tries
  if pid=$(running_pid); then
    first=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null || true)
    # shellcheck disable=SC2086 - a list of at most one pid
    kill -KILL ${first:-$pid} 2>/dev/null || true
    for ((tries = 0; tries < 100; tries++)); do
      [ -d "/proc/$pid" ] || break
      sleep 0.05
    done
    say "$name stopped"
  fi
  rm -f "$board/pid"
}

clean() {
  local entry
  for entry in "$cache"/boards/*/; do
    [ -d "$entry" ] || continue
    name=$(basename "$entry")
    settle
    stop
  done
  rm -rf --one-file-system "$cache"
}

action=${1:-help}
[ $# -eq 0 ] || shift
while [ $# -gt 0 ]; do
  case $1 in
    --name) name=$2; shift 2 ;;
    --arch) arch=$2; shift 2 ;;
    --cpu) cpu=$2; shift 2 ;;
    *) break ;;
  esac
done
settle
case $action in
  start) start ;;
  stop) stop ;;
  status) running_pid >/dev/null && echo "$name runs" || { echo "$name does not run"; exit 3; } ;;
  ssh) exec ssh -F "$board/ssh_config" board "$@" ;;
  image) build_image ;;
  clean) clean ;;
  inside) inside ;;
  *) sed -n '2,19s/^# \{0,1\}//p' "$script"; exit 2 ;;
esac
