# The guest that the nightly virtual machines share, for sourcing: needs MODULES and WORK; goes to WORK, and leaves there a
# kernel ($version) and initrd.gz: a machine that sees this one's files read-only and runs the command of its command line.
for program in qemu-system-x86_64 busybox depmod modprobe cpio gzip dpkg-deb; do
  command -v "$program" >/dev/null || { echo "$program is missing; apt-get install qemu-system-x86 busybox-static kmod cpio" >&2; exit 2; }
done
mkdir -p "$WORK"
cd "$WORK"

# The kernel of this distribution, as a package, with its modules.
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
