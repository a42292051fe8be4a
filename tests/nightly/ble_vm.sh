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

for program in qemu-system-x86_64 busybox depmod modprobe cpio gzip dpkg-deb; do
  command -v "$program" >/dev/null || { echo "$program is missing; apt-get install qemu-system-x86 busybox-static kmod cpio" >&2; exit 2; }
done
[ -x /usr/libexec/bluetooth/bluetoothd ] || { echo "bluetoothd is missing; apt-get install bluez" >&2; exit 2; }
mkdir -p "$WORK"
cd "$WORK"

# The kernel of this distribution, as a package: its modules have hci_vhci.
if [ ! -d kernel ]; then
  package=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
  apt-get download "$package"
  dpkg-deb -x "$package"_*.deb kernel
fi
version=$(basename kernel/lib/modules/*)
depmod -b kernel "$version"

# The other side of the air: bumble's controllers and peripherals, for this test alone.
[ -d site/bumble ] || "$ROOT/.venv/bin/uv" pip install -q --python "$ROOT/.venv/bin/python" --target site bumble

# A first file system: busybox, the modules in their order, and what turns them into a machine.
rm -rf initrd && mkdir -p initrd/{bin,modules,proc,sys,dev,host,scratch,root}
cp "$(command -v busybox)" initrd/bin/
for applet in sh mount mkdir insmod cat sed chroot poweroff ip; do ln -sf busybox "initrd/bin/$applet"; done
: > initrd/order
for module in $MODULES; do
  modprobe -d "$PWD/kernel" -S "$version" --show-depends "$module" | awk '/^insmod/ { print $2 }' | while read -r file; do
    name=$(basename "$file")
    [ -e "initrd/modules/$name" ] || { cp "$file" initrd/modules/; echo "$name" >> initrd/order; }
  done
done
cat > initrd/init <<'INIT'
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in $(cat /order); do insmod /modules/$module; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,ro,cache=loose host /host
mount -t tmpfs scratch /scratch; mkdir /scratch/upper /scratch/work
mount -t overlay -o lowerdir=/host,upperdir=/scratch/upper,workdir=/scratch/work overlay /root
mount -t proc proc /root/proc; mount -t sysfs sys /root/sys; mount -t devtmpfs dev /root/dev
mount -t tmpfs run /root/run; mount -t tmpfs tmp /root/tmp
chroot /root /bin/bash -c "export HOME=/tmp PATH=/usr/sbin:/usr/bin:/sbin:/bin; ip link set lo up; $(sed -n 's/.*command=\([^ ]*\).*/\1/p' /proc/cmdline)"
poweroff -f
INIT
chmod +x initrd/init
(cd initrd && find . | cpio -o -H newc --quiet | gzip -1) > initrd.gz

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
