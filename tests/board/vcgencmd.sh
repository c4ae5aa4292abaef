#!/bin/sh
# Raspberry Pi's own query command, answered from files that a test may write.
case "$1" in
  get_throttled) echo "throttled=$(cat /etc/board/throttled)" ;;
  measure_temp)
    millidegrees=$(cat /sys/class/thermal/thermal_zone0/temp)
    echo "temp=$((millidegrees / 1000)).$((millidegrees % 1000 / 100))'C"
    ;;
  measure_clock) echo "frequency(48)=$(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq)000" ;;
  *)
    echo 'error=1 error_msg="Command not registered"'
    exit 255
    ;;
esac
