#!/bin/sh
# Makes a small cloud image of the distribution's packages: a raw disk at $1 with a
# boot loader, a kernel, systemd and cloud-init. It is worked on beside that, needs
# root and mmdebstrap, and no loop device.
set -eu
out=$1
tree=$out.tree
trap 'rm -rf "$tree" "$out.core" "$out.part"' EXIT

# What nobody reads is left out: an emulated machine reads the rest slowly enough.
mmdebstrap --quiet --variant=minbase --mode=root --format=directory --aptopt='APT::Install-Recommends "false"' \
	--include=linux-image-cloud-amd64,systemd-sysv,udev,dbus,ifupdown,iproute2,cloud-init,cloud-guest-utils,grub-pc-bin,netcat-openbsd \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
	--essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
	--essential-hook='printf "MODULES=list\nCOMPRESS=lz4\n" >"$1/etc/initramfs-tools/conf.d/small"' \
	--essential-hook='mkdir -p "$1/usr/share/initramfs-tools/modules.d"' \
	--essential-hook='printf "virtio_pci\nvirtio_blk\next4\n" >"$1/usr/share/initramfs-tools/modules.d/small"' \
	bookworm "$tree"

# The loader has all that it needs in it: where the kernel is, and how to start it.
cat >"$tree/tmp/load.cfg" <<'END'
set root=(hd0,msdos1)
echo "loading the kernel"
linux /vmlinuz root=/dev/vda1 ro console=ttyS0 mitigations=off
initrd /initrd.img
boot
END
chroot "$tree" grub-mkimage -O i386-pc -p / -c /tmp/load.cfg -o /tmp/core biosdisk part_msdos ext2 linux echo minicmd
mv "$tree/tmp/core" "$out.core"
cp "$tree/usr/lib/grub/i386-pc/boot.img" "$out.part"
rm -rf "$tree/usr/lib/grub" "$tree/var/lib/apt/lists" "$tree/tmp/load.cfg"
echo '/dev/vda1 / ext4 errors=remount-ro 0 1' >"$tree/etc/fstab"
: >"$tree/etc/machine-id"
echo localhost >"$tree/etc/hostname"

# The first sector: the loader's first piece, then one partition, active, of Linux,
# from sector 2048 on, then the mark. The loader's rest follows.
size=1008
truncate -s 440 "$out.part"
truncate -s 446 "$out.part"
printf '\200\040\041\000\203\376\377\377\000\010\000\000\000\200\037\000' >>"$out.part"
truncate -s 510 "$out.part"
printf '\125\252' >>"$out.part"
cat "$out.core" >>"$out.part"
truncate -s $(((size + 1) << 20)) "$out.part"
mke2fs -q -t ext4 -d "$tree" -E offset=1048576 "$out.part" ${size}M
mv "$out.part" "$out"
