#!/usr/bin/env bash
# hardware.sh ROOT ARCH CPU: writes what ROOT's programs read about their hardware into /sys and /etc/board.
# The host's own /sys and /proc/cpuinfo describe an x86 machine, and the runtimes crash on that.
set -euo pipefail
root=$1 arch=$2 cpu=$3

cores=$(nproc)                 # more than the host's would make pinning of threads fail
[ "$cores" -le 4 ] || cores=4
case $cpu in                   # (MIDR part number, the features Linux lists)
  cortex-a53) part=0xd03 features="fp asimd evtstrm crc32 cpuid" ;;
  cortex-a76) part=0xd0b features="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp" ;;
  cortex-a15) part=0xc0f features="half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm" ;;
  *) part=0xd08 features="fp asimd evtstrm crc32 cpuid" ;;
esac
model="Emulated ARM board ($cpu, $arch)"

board=$root/etc/board
processors=$root/sys/devices/system/cpu
zone=$root/sys/class/thermal/thermal_zone0
mkdir -p "$processors" "$zone" "$root/sys/firmware/devicetree/base"
for list in possible present online; do echo "0-$((cores - 1))" >"$processors/$list"; done
echo 7 >"$processors/kernel_max"
for ((core = 0; core < cores; core++)); do
  folder=$processors/cpu$core
  mkdir -p "$folder/topology" "$folder/cpufreq"
  echo "$core" >"$folder/topology/core_id"
  echo 0 >"$folder/topology/physical_package_id"
  echo "0-$((cores - 1))" >"$folder/topology/core_siblings_list"
  echo "$core" >"$folder/topology/thread_siblings_list"
  echo 600000 >"$folder/cpufreq/cpuinfo_min_freq"
  echo 1800000 | tee "$folder/cpufreq/cpuinfo_max_freq" >"$folder/cpufreq/scaling_cur_freq"
  echo ondemand >"$folder/cpufreq/scaling_governor"
  printf '%s\t: %s\n' processor "$core" BogoMIPS 108.00 Features "$features" 'CPU implementer' 0x41 \
    'CPU architecture' 8 'CPU variant' 0x0 'CPU part' "$part" 'CPU revision' 3
  echo
done >"$board/cpuinfo"
printf 'Model\t\t: %s\n' "$model" >>"$board/cpuinfo"
printf '%s\0' "$model" >"$root/sys/firmware/devicetree/base/model"
echo cpu-thermal >"$zone/type"
echo 48300 >"$zone/temp"
echo 0x0 >"$board/throttled"
echo "emulated=1 cpu=$cpu" >"$board/emulated"
chmod 666 "$board/throttled" "$zone/temp" "$processors"/cpu*/cpufreq/*
