package microvm

import (
	"bufio"
	"fmt"
	"os"

	"github.com/atoll-run/atoll/sandbox"
)

const (
	// minMemory is the least with which a kernel and the agent come up, in bytes.
	minMemory = 96 << 20
	// hostReserve is how much of the host's memory must be free for one more
	// machine, in bytes: what it takes at once, and some for everybody else.
	hostReserve = 256 << 20
)

// admit says whether there is room for one more machine with so much memory,
// beside those that may have promised bytes together.
func (r *Runtime) admit(memory, promised int64) error {
	host, err := hostMemory()
	if err != nil {
		return sandbox.E("find room", sandbox.Internal, "", err)
	}
	return host.admit(memory, promised, r.cfg.Overcommit)
}

// memoryInfo is the host's memory in bytes.
type memoryInfo struct{ total, available int64 }

// admit judges by figures alone. promised is what the present machines may have
// together; since they share much and rarely use it all, that may be more than
// there is, up to factor times.
func (m memoryInfo) admit(want, promised int64, factor float64) error {
	if bound := int64(factor * float64(m.total)); promised+want > bound {
		return sandbox.Errorf("find room", sandbox.Exhausted, "",
			"machines may have %d MiB of memory together, %.3g times what the host has; %d MiB are given away and %d MiB wanted",
			bound>>20, factor, promised>>20, want>>20).WithHint("remove sandboxes, or ask for less memory")
	}
	if m.available < hostReserve {
		return sandbox.Errorf("find room", sandbox.Exhausted, "",
			"only %d of the host's %d MiB of memory are available, and %d MiB must be for one more machine",
			m.available>>20, m.total>>20, hostReserve>>20).WithHint("remove or pause sandboxes")
	}
	return nil
}

// hostMemory reads the host's memory.
func hostMemory() (m memoryInfo, err error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return m, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var kib int64
		if n, _ := fmt.Sscanf(s.Text(), "MemTotal: %d kB", &kib); n == 1 {
			m.total = kib << 10
		}
		if n, _ := fmt.Sscanf(s.Text(), "MemAvailable: %d kB", &kib); n == 1 {
			m.available = kib << 10
		}
	}
	if m.total == 0 {
		return m, fmt.Errorf("/proc/meminfo does not say how much memory there is")
	}
	return m, nil
}
