#!/bin/bash
# Real power cuts: the shipped buffer in a virtual machine whose power goes at any moment; see README.md beside this file.
# Needs: apt-get install qemu-system-x86 busybox-static kmod cpio e2fsprogs, root (it mounts the disk), and a .venv (make
# setup). The guest sees this machine's files read-only. Words go to tests.nightly.power_vm: --cuts 20 --seed 1 --record
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
WORK=${POWER_VM_FOLDER:-$ROOT/.build/power_vm}
MODULES="virtio_pci 9pnet_virtio 9p overlay virtio_blk ext4"

for program in qemu-system-x86_64 busybox depmod modprobe cpio gzip dpkg-deb; do
  command -v "$program" >/dev/null || { echo "$program is missing; apt-get install qemu-system-x86 busybox-static kmod cpio" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "mounting the disk needs root: sudo $0" >&2; exit 2; }
mkdir -p "$WORK"
cd "$WORK"

# The kernel of this distribution, as a package: its modules have virtio and ext4.
if [ ! -d kernel ]; then
  package=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
  apt-get download "$package"
  dpkg-deb -x "$package"_*.deb kernel
fi
version=$(basename kernel/lib/modules/*)
depmod -b kernel "$version"

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
