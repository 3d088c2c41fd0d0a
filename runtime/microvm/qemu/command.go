package qemu

import (
	"fmt"
	"net"
	"strconv"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// translationCache is how much code TCG keeps translated, in MiB. More makes
// machines larger, not faster: one that has run a few programs holds some 25.
const translationCache = 32

// consoleSize is how much of what the guest's kernel says last is kept, in
// bytes: enough for a panic. A PC's console has all that its system says, see vmm.
const consoleSize = 16 << 10

// command is what QEMU is told at its start. Numbers are of descriptors in the
// new process; 0 is none.
type command struct {
	acceleration
	port   string // name of the guest's serial port
	size   int64  // of memory, bytes
	shared bool
	cpus   int
	mac    net.HardwareAddr
	kernel *kernelFiles // nil: nothing is booted, or a PC's first disk
	pc     bool
	boot   bool // the PC's first disk

	control, serial, memory, tap int
	firmware                     int // a PC's
	disks                        []diskFiles
}

// kernelFiles is what to boot, as descriptors.
type kernelFiles struct {
	image, initrd int // initrd may be 0
	args          string
}

// diskFiles is one disk.
type diskFiles struct {
	serial string
	layers []layerFile // from the lowest
	qcow2  bool        // the lowest one is
}

// layerFile is the descriptors of one layer. QEMU opens a writable layer anew,
// for reading only, when another one is put upon it.
type layerFile struct {
	read  int
	write int // 0: the layer is not written
}

// arguments is QEMU's command line. All devices are named, so that state of one
// machine fits another that was made of the same things.
func (c command) arguments() []string {
	args := append(c.board(),
		"-accel", c.accel(), "-cpu", c.cpu(), "-smp", strconv.Itoa(c.cpus), "-m", kib(c.size),
		"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%s,mem-path=/proc/self/fd/%d,share=%s", kib(c.size), c.memory, onOff(c.shared)),
		"-nodefaults", "-no-user-config", "-display", "none",
		"-global", "migration.send-configuration=off",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		// Whoever made us is connected already, so that waiting is over at once; later ones may come and go.
		"-chardev", fmt.Sprintf("socket,id=control,fd=%d,server=on,wait=off", c.control), "-mon", "chardev=control,mode=control",
		"-serial", "chardev:console",
		"-device", c.virtio("serial")+",id=serial",
		"-chardev", fmt.Sprintf("socket,id=guest,fd=%d,server=on,wait=on", c.serial),
		"-device", "virtserialport,chardev=guest,name="+c.port,
		"-device", c.virtio("balloon")+",id=balloon,free-page-reporting=on,deflate-on-oom=on",
		"-device", c.virtio("rng")+",id=rng",
	)
	for i, d := range c.disks {
		args = append(args, d.arguments(i)...)
		device := fmt.Sprintf("%s,id=disk%d,serial=%s,drive=%s", c.virtio("blk"), i, d.serial, layerName(i, len(d.layers)-1))
		if c.pc && i == 0 {
			device += ",bootindex=0"
		}
		args = append(args, "-device", device)
	}
	if c.tap > 0 {
		device := c.virtio("net") + ",id=nic,netdev=net,mac=" + c.mac.String()
		if c.pc {
			device += ",romfile=" // nothing is booted from the network
		}
		args = append(args, "-netdev", fmt.Sprintf("tap,id=net,fd=%d,vhost=off", c.tap), "-device", device)
	}
	switch k := c.kernel; {
	case k != nil:
		args = append(args, "-kernel", fdPath(k.image), "-append", c.kernelArgs()+k.args)
		if k.initrd > 0 {
			args = append(args, "-initrd", fdPath(k.initrd))
		}
	case !c.boot:
		args = append(args, "-incoming", "defer")
	}
	return args
}

// board is what the devices are on. A guest that ends leaves QEMU standing until
// its last words are read.
func (c command) board() []string {
	const common = ",memory-backend=ram,suppress-vmdesc=on"
	const end = ",shutdown=pause,panic=pause"
	if !c.pc {
		return []string{
			"-M", "microvm,acpi=on,isa-serial=on" + common, "-action", "reboot=shutdown" + end,
			"-chardev", fmt.Sprintf("ringbuf,id=console,size=%d", consoleSize),
		}
	}
	// Without graphics the firmware, and with it most boot loaders, is on the console
	// too. Such systems start themselves anew, at times on their first boot. A machine
	// whose state was loaded can do so because its firmware is a flash memory: QEMU's
	// own way to have it would leave it empty there.
	return []string{
		"-M", "q35,smm=off,vmport=off,sata=off,smbus=off,graphics=off,pflash0=firmware" + common, "-action", "reboot=reset" + end, "-device", "pvpanic",
		"-add-fd", fmt.Sprintf("fd=%d,set=%d", c.firmware, c.firmware),
		"-blockdev", fmt.Sprintf("driver=file,node-name=firmware-file,filename=/dev/fdset/%d,read-only=on,locking=off", c.firmware),
		"-blockdev", "driver=raw,node-name=firmware,file=firmware-file,read-only=on",
		"-chardev", fmt.Sprintf("ringbuf,id=console,size=%d", vmm.ConsoleSize),
	}
}

// virtio is the name of a paravirtual device, on PCI where there is that.
func (c command) virtio(kind string) string {
	if c.pc {
		return "virtio-" + kind + "-pci"
	}
	return "virtio-" + kind + "-device"
}

// arguments describes a disk's layers, each upon the one before.
func (d diskFiles) arguments(disk int) []string {
	var args []string
	for i, l := range d.layers {
		args = append(args, "-add-fd", fmt.Sprintf("fd=%d,set=%d", l.read, l.read))
		readOnly := onOff(l.write == 0)
		if l.write > 0 {
			args = append(args, "-add-fd", fmt.Sprintf("fd=%d,set=%d", l.write, l.read))
		}
		format := "driver=raw"
		switch {
		case i > 0:
			format = "driver=qcow2,backing=" + layerName(disk, i-1)
		case d.qcow2:
			format = "driver=qcow2"
		}
		args = append(args,
			"-blockdev", fmt.Sprintf("driver=file,node-name=%s,filename=/dev/fdset/%d,read-only=%s,locking=off,discard=unmap,cache.no-flush=on", fileName(disk, i), l.read, readOnly),
			"-blockdev", fmt.Sprintf("%s,node-name=%s,file=%s,read-only=%s,discard=unmap", format, layerName(disk, i), fileName(disk, i), readOnly))
	}
	return args
}

// layerName and fileName name the nodes of a disk's layer.
func layerName(disk, layer int) string { return fmt.Sprintf("disk%d-%d", disk, layer) }
func fileName(disk, layer int) string  { return fmt.Sprintf("file%d-%d", disk, layer) }

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func kib(bytes int64) string { return strconv.FormatInt(bytes>>10, 10) + "k" }

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// acceleration is how guest code is run on this host.
type acceleration struct {
	kvm    bool
	tscKHz int // of the host; 0 when it cannot be told
}

func (a acceleration) name() string {
	if a.kvm {
		return "kvm"
	}
	return "tcg"
}

func (a acceleration) accel() string {
	if a.kvm {
		return "kvm"
	}
	return fmt.Sprintf("tcg,thread=single,tb-size=%d", translationCache)
}

// cpu is the model that the guest sees. Without arat the guest's clock would keep
// waking an idle emulated machine.
func (a acceleration) cpu() string {
	if a.kvm {
		return "host"
	}
	return "Nehalem-v1,+arat"
}

// kernelArgs is what the guest's kernel must know of the machine, with a space at
// the end. An emulated clock cannot be calibrated: the emulator may be held up.
func (a acceleration) kernelArgs() string {
	// Of the kernel's security modules a sandbox has use for those that programs
	// apply to themselves. Proactive compaction would wake an idle machine twice a second.
	args := "console=ttyS0 quiet reboot=t panic=-1 8250.nr_uarts=1 cryptomgr.notests random.trust_cpu=on audit=0 lsm=landlock,yama sysctl.vm.compaction_proactiveness=0 "
	if !a.kvm {
		// An emulated processor does not speculate. Code is translated anew at each
		// address at which it is met, so that randomized addresses would make every
		// start of a program like its first. Statistics of pressure are code on the
		// path of every switch; the agent need not preempt itself by signals.
		args += "no_timer_check mitigations=off tsc=reliable norandmaps psi=0 GODEBUG=asyncpreemptoff=1,updatemaxprocs=0 "
		if a.tscKHz > 0 {
			args += fmt.Sprintf("tsc_early_khz=%d ", a.tscKHz)
		}
	}
	return args
}

// memoryUnit is the unit of memory sizes, memoryOdd what is added. QEMU before 9.0
// loses pages of an emulated machine that is moved when its memory is a whole
// number of units.
const (
	memoryUnit = 256 << 10
	memoryOdd  = 8 << 10
)

// roundMemory makes a size that machines can have of one that was asked for.
func roundMemory(size int64) int64 {
	return (size+memoryUnit-1)/memoryUnit*memoryUnit + memoryOdd
}
