#!/bin/bash
# Real power cuts: the shipped buffer in a virtual machine whose power goes at any moment; see README.md beside this file.
# Needs: apt-get install qemu-system-x86 busybox-static kmod cpio e2fsprogs, root (it mounts the disk), and a .venv (make
# setup). The guest sees this machine's files read-only. Words go to tests.nightly.power_vm: --cuts 20 --seed 1 --record
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
WORK=${POWER_VM_FOLDER:-$ROOT/.build/power_vm}
MODULES="virtio_pci 9pnet_virtio 9p overlay virtio_blk ext4"

[ "$(id -u)" = 0 ] || { echo "mounting the disk needs root: sudo $0" >&2; exit 2; }
. "$HERE/guest.sh"

# The seed comes by the kernel's command line.
cat > inside.sh <<INSIDE
#!/bin/bash
cd "$ROOT"
exec env PYTHONPATH="$ROOT" PYTHONDONTWRITEBYTECODE=1 "$ROOT/.venv/bin/python" -m tests.nightly.power_vm guest \\
  --seed "\$(sed -n 's/.*seed=\([0-9]*\).*/\1/p' /proc/cmdline)" 2>&1
INSIDE
chmod +x inside.sh

# Emulated unless asked otherwise: inside another virtual machine /dev/kvm may be there and not work.
accelerated=(-accel tcg,thread=multi -cpu max)
if [ -n "${POWER_VM_KVM:-}" ]; then accelerated=(-accel kvm -cpu host); fi
cd "$ROOT"
exec "$ROOT/.venv/bin/python" -m tests.nightly.power_vm host "$@" -- qemu-system-x86_64 "${accelerated[@]}" -smp 2 \
  -m 1024 -nographic -no-reboot -nodefaults -serial stdio -kernel "$WORK/kernel/boot/vmlinuz-$version" \
  -initrd "$WORK/initrd.gz" -virtfs "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap" \
  -drive "file=IMAGE,if=virtio,format=raw,cache=writeback" \
  -append "console=ttyS0 quiet loglevel=3 panic=-1 seed=SEED command=$WORK/inside.sh"
