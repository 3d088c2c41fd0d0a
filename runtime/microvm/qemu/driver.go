// Package qemu runs virtual machines on QEMU, under KVM or by emulation.
package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/runtime/process"
	"github.com/atoll-run/atoll/sandbox"
)

// Program is QEMU as distributions call it.
const Program = "qemu-system-x86_64"

// callTimeout bounds a call of QMP that nobody waits for.
const callTimeout = 5 * time.Second

// Driver starts machines with one QEMU.
type Driver struct {
	program string
	version string // "7.2.22"
	accel   acceleration
	kvm     int // group that may use /dev/kvm; 0 when it is not used
}

var _ vmm.Driver = (*Driver)(nil)

// Open looks for QEMU. Empty program means Program in the search path. It emulates
// until UseKVM says otherwise. It fails with Unsupported when there is no QEMU
// that it can use.
func Open(ctx context.Context, program string) (*Driver, error) {
	const op = "qemu.Open"
	if program == "" {
		program = Program
	}
	path, err := exec.LookPath(program)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Unsupported, "", fmt.Errorf("QEMU is not installed: %w", err)).
			WithHint("run `apt install --no-install-recommends qemu-system-x86`")
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return nil, sandbox.E(op, sandbox.Unsupported, path, fmt.Errorf("ask for its version: %w", err))
	}
	version, err := parseVersion(out)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Unsupported, path, err).WithHint("QEMU 7.2 or later is needed")
	}
	return &Driver{program: path, version: version}, nil
}

var versionPattern = regexp.MustCompile(`QEMU emulator version (\d+)\.(\d+)[.\d]*`)

// parseVersion reads what --version prints.
func parseVersion(out []byte) (string, error) {
	m := versionPattern.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("it does not say its version: %.80q", out)
	}
	var major, minor int
	_, err := fmt.Sscan(string(m[1])+" "+string(m[2]), &major, &minor)
	if err != nil || major < 7 || major == 7 && minor < 2 {
		return "", fmt.Errorf("it is version %s.%s", m[1], m[2])
	}
	return string(bytes.TrimPrefix(m[0], []byte("QEMU emulator version "))), nil
}

// Version names QEMU's version, the accelerator and the processor that guests see.
func (d *Driver) Version() string {
	return fmt.Sprintf("qemu %s %s %s", d.version, d.accel.name(), d.accel.cpu())
}

// Accelerator is "kvm" or "tcg".
func (d *Driver) Accelerator() string { return d.accel.name() }

// Memory rounds a size to one that machines can have.
func (d *Driver) Memory(size int64) int64 { return roundMemory(size) }

// CPUs is what is wanted, or one where they are emulated: all would share one
// thread, and wait for each other.
func (d *Driver) CPUs(wanted int) int {
	if !d.accel.kvm {
		return 1
	}
	return max(1, wanted)
}

// files collects what a new process gets, and knows the numbers there.
type files struct {
	list []*os.File
	own  []*os.File // opened here, to be closed
}

// add gives a file; 0 for none.
func (f *files) add(file *os.File) int {
	if file == nil {
		return 0
	}
	f.list = append(f.list, file)
	return 2 + len(f.list)
}

// open gives a file that is opened for it.
func (f *files) open(path string, flags int) (int, error) {
	file, err := os.OpenFile(path, flags|syscall.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	f.own = append(f.own, file)
	return f.add(file), nil
}

func (f *files) close() {
	for _, file := range f.own {
		file.Close()
	}
}

// Start starts QEMU and returns when it answers on its control socket.
func (d *Driver) Start(ctx context.Context, c vmm.Config) (vmm.Machine, error) {
	m, err := d.start(ctx, c)
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (d *Driver) start(ctx context.Context, c vmm.Config) (m *machine, err error) {
	var f files
	defer f.close()
	cmd, err := d.plan(c, &f)
	if err != nil {
		return nil, err
	}
	// Connected before there is anybody to accept: QEMU waits for the guest's
	// port, so that the guest never sees it unconnected.
	serial, err := dial(c.Dir, serialName)
	if err != nil {
		return nil, err
	}
	control, err := dial(c.Dir, controlName)
	if err != nil {
		return nil, errors.Join(err, serial.Close())
	}
	words, err := output()
	if err != nil {
		return nil, errors.Join(err, serial.Close(), control.Close())
	}
	p, err := spawn(c.Group, d.program, cmd.arguments(), f.list, words, d.kvm, c.Boot)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start QEMU: %w", err), serial.Close(), control.Close(), words.Close())
	}
	m = newMachine(c.Dir, p)
	m.serial, m.output = serial, words
	// Only QEMU holds the listening ends now: its death cuts the connections.
	f.close()
	if m.qmp, err = openQMP(ctx, control, m.take); err != nil {
		return nil, errors.Join(m.explain("start QEMU", err), m.Kill())
	}
	return m, nil
}

// plan opens what QEMU gets.
func (d *Driver) plan(c vmm.Config, f *files) (command, error) {
	cmd := command{acceleration: d.accel, port: c.Port, size: c.Size, shared: c.Shared, cpus: c.CPUs, mac: c.MAC, pc: c.PC, boot: c.Boot}
	for name, to := range map[string]*int{controlName: &cmd.control, serialName: &cmd.serial} {
		l, err := listen(c.Dir, name)
		if err != nil {
			return cmd, err
		}
		f.own = append(f.own, l)
		*to = f.add(l)
	}
	cmd.memory, cmd.tap = f.add(c.Memory), f.add(c.Tap)
	if k := c.Kernel; k != nil {
		cmd.kernel = &kernelFiles{args: k.Args}
		for path, to := range map[string]*int{k.Image: &cmd.kernel.image, k.Initrd: &cmd.kernel.initrd} {
			if path == "" {
				continue
			}
			fd, err := f.open(path, os.O_RDONLY)
			if err != nil {
				return cmd, fmt.Errorf("open the guest's kernel: %w", err)
			}
			*to = fd
		}
	}
	if c.PC {
		var err error
		if cmd.firmware, err = d.openFirmware(f); err != nil {
			return cmd, err
		}
	}
	for _, disk := range c.Disks {
		var layers []layerFile
		for i, path := range disk.Layers {
			var l layerFile
			var err error
			if l.read, err = f.open(path, os.O_RDONLY); err == nil && disk.Writable && i == len(disk.Layers)-1 {
				l.write, err = f.open(path, os.O_RDWR)
			}
			if err != nil {
				return cmd, fmt.Errorf("open a disk: %w", err)
			}
			layers = append(layers, l)
		}
		cmd.disks = append(cmd.disks, diskFiles{disk.Serial, layers, disk.QCOW2})
	}
	return cmd, nil
}

// openFirmware gives what a PC starts with, SeaBIOS, from where QEMU or a distribution
// has it.
func (d *Driver) openFirmware(f *files) (int, error) {
	const name = "bios-256k.bin"
	for _, dir := range []string{"/usr/share/seabios", "/usr/share/qemu", filepath.Join(filepath.Dir(d.program), "../share/qemu")} {
		fd, err := f.open(filepath.Join(dir, name), os.O_RDONLY)
		if err == nil || !errors.Is(err, os.ErrNotExist) {
			return fd, err
		}
	}
	return 0, sandbox.Errorf("qemu.Start", sandbox.Unsupported, name, "the firmware SeaBIOS is not installed, which boots disk images").
		WithHint("apt install seabios")
}

// Adopt takes over a QEMU that an earlier process of ours started.
func (d *Driver) Adopt(ctx context.Context, dir string, p *process.Process) (vmm.Machine, error) {
	if err := p.Open(); err != nil {
		return nil, fmt.Errorf("the machine's process is gone: %w", err)
	}
	m := newMachine(dir, p)
	control, err := dial(dir, controlName)
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	if m.qmp, err = openQMP(ctx, control, m.take); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	// A guest that ended while nobody listened has left QEMU standing.
	var status struct {
		Status string `json:"status"`
	}
	if err := m.qmp.call(ctx, "query-status", nil, &status); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	switch status.Status {
	case "guest-panicked":
		m.end("the guest's kernel panicked")
	case "shutdown":
		m.end("the guest ended")
	}
	return m, nil
}
