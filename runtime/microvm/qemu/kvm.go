package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

const kvmDevice = "/dev/kvm"

// probeTime is how long a kernel may take to boot under KVM up to where it finds
// no first process. It takes a fifth of a second where KVM works.
const probeTime = 10 * time.Second

// verdict is what was found out about this host, until it boots again.
type verdict struct {
	Boot    string `json:"boot"`    // the kernel's ID of this boot
	Version string `json:"version"` // of QEMU
	Reason  string `json:"reason"`  // why KVM cannot be used; empty: it can
	TSCKHz  int    `json:"tscKHz"`  // frequency of the processors' counter; 0 when unknown
}

// Emulate makes all machines run by emulation.
func (d *Driver) Emulate() { d.accel, d.kvm = acceleration{tscKHz: measureTSC()}, 0 }

// Accelerate makes machines run under KVM if a kernel really boots under it: on
// some hosts the device is there and answers, and guests hang. What was found out
// is kept in the file for as long as the host is up. why says why KVM is not used;
// then machines are emulated.
func (d *Driver) Accelerate(ctx context.Context, file, kernel string, group *cgroup.Group) (why string, err error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	v := verdict{Boot: strings.TrimSpace(string(boot)), Version: d.version}
	if old, err := readVerdict(file); err == nil && old.Boot == v.Boot && old.Version == v.Version {
		v = old
	} else {
		v.Reason = d.tryKVM(ctx, kernel, group)
		if err := ctx.Err(); err != nil {
			return "", err // nothing was found out
		}
		v.TSCKHz = measureTSC()
		if err := writeVerdict(file, v); err != nil {
			return "", err
		}
	}
	d.accel, d.kvm = acceleration{tscKHz: v.TSCKHz}, 0
	if v.Reason == "" {
		d.accel.kvm = true
		d.kvm, err = kvmGroup()
	}
	return v.Reason, err
}

func readVerdict(file string) (v verdict, err error) {
	data, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(data, &v)
	}
	return v, err
}

func writeVerdict(file string, v verdict) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := fmt.Sprintf("%s.%d", file, os.Getpid())
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

// kvmGroup is the group that may use KVM. QEMU is nobody, and in that group.
func kvmGroup() (int, error) {
	info, err := os.Stat(kvmDevice)
	if err != nil {
		return 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Gid == 0 || info.Mode()&0o060 != 0o060 {
		return 0, fmt.Errorf("%s belongs to root alone: it must belong to a group such as kvm that may read and write it", kvmDevice)
	}
	return int(st.Gid), nil
}

// tryKVM boots a kernel that has nothing to run, and says why that failed.
func (d *Driver) tryKVM(ctx context.Context, kernel string, group *cgroup.Group) (why string) {
	gid, err := kvmGroup()
	if errors.Is(err, os.ErrNotExist) {
		return "this host has no " + kvmDevice
	}
	if err != nil {
		return err.Error()
	}
	probe := &Driver{program: d.program, version: d.version, accel: acceleration{kvm: true}, kvm: gid}
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	if err := probe.bootNothing(ctx, kernel, group); err != nil {
		return fmt.Sprintf("%s is there, but a kernel does not boot under it: %v", kvmDevice, err)
	}
	return ""
}

// bootNothing boots a kernel without a first process and returns when it panics
// for that.
func (d *Driver) bootNothing(ctx context.Context, kernel string, group *cgroup.Group) (err error) {
	dir, err := os.MkdirTemp("", "atoll-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := group.Create(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, group.Remove()) }()
	size := roundMemory(128 << 20)
	memory, err := vmm.NewMemory(size)
	if err != nil {
		return err
	}
	defer memory.Close()
	m, err := d.Start(ctx, vmm.Config{
		Dir: filepath.Clean(dir), Port: "none", Group: group, Memory: memory, Size: size, CPUs: 1, Kernel: &vmm.Kernel{Image: kernel},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Kill()) }()
	select {
	case <-m.Ended():
	case <-ctx.Done():
		return ctx.Err()
	}
	if cause := m.Cause(); !strings.Contains(cause, "panicked") {
		return fmt.Errorf("it ended: %s", cause)
	}
	return nil
}
