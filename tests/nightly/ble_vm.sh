#!/bin/bash
# The Bluetooth drivers on a real bluetoothd and a real kernel, in a virtual machine; see README.md beside this file.
# Needs: apt-get install qemu-system-x86 busybox-static kmod cpio bluez dbus, and a .venv (make setup). The machine sees
# this one's files read-only; all that it writes is in its memory.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
WORK=${BLE_VM_FOLDER:-$ROOT/.build/ble_vm}
LIMIT_S=${BLE_VM_LIMIT_S:-600}
MODULES="virtio_pci 9pnet_virtio 9p overlay algif_hash algif_skcipher cmac ccm ecb hci_vhci"

[ -x /usr/libexec/bluetooth/bluetoothd ] || { echo "bluetoothd is missing; apt-get install bluez" >&2; exit 2; }
. "$HERE/guest.sh"

# The other side of the air: bumble's controllers and peripherals, for this test alone.
[ -d site/bumble ] || "$ROOT/.venv/bin/uv" pip install -q --python "$ROOT/.venv/bin/python" --target site bumble

cat > inside.sh <<INSIDE
#!/bin/bash
mkdir -p /run/dbus /tmp/bluetooth /var/lib/bluetooth
rm -rf /var/lib/bluetooth/*
dbus-daemon --system --fork --nopidfile
cd "$ROOT"
PYTHONPATH="$ROOT:$WORK/site" PYTHONDONTWRITEBYTECODE=1 "$ROOT/.venv/bin/python" -m tests.nightly.ble_vm 2>&1
INSIDE
chmod +x inside.sh

# Emulated unless asked otherwise: inside another virtual machine /dev/kvm may be there and not work.
accelerated=(-accel tcg,thread=multi -cpu max)
if [ -n "${BLE_VM_KVM:-}" ]; then accelerated=(-accel kvm -cpu host); fi
timeout "$LIMIT_S" qemu-system-x86_64 "${accelerated[@]}" -smp 2 -m 1536 -nographic -no-reboot -nodefaults -serial stdio \
  -kernel "kernel/boot/vmlinuz-$version" -initrd initrd.gz \
  -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
  -append "console=ttyS0 quiet loglevel=3 panic=-1 command=$WORK/inside.sh" </dev/null | tee run.log
grep -q "BLE VM OK" run.log
