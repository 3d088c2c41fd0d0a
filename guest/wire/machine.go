package wire

import (
	"net/netip"
	"time"
)

// What a machine and the runtime that makes it agree on, when the agent is the
// first process of an initramfs.
const (
	MachineSerial = "atoll.guest" // name of the virtio-serial port that leads to the agent
	DiskRoot      = "vda"         // the first disk: the read-only root, EROFS
	DiskOverlay   = "vdb"         // the second: what the machine writes, ext4
	ModulesDir    = "/modules"    // in the initramfs: modules, to be loaded in the order of their names
)

// Machine is the body of POST /machine, by which the runtime gives a machine
// that began as another's copy its own identity. Absent fields change nothing.
type Machine struct {
	Time     *time.Time      `json:"time,omitempty"`    // sets the clock
	Entropy  []byte          `json:"entropy,omitempty"` // seeds the kernel's random numbers, at most 4096 bytes
	Hostname string          `json:"hostname,omitempty"`
	Network  *MachineNetwork `json:"network,omitempty"`
	Pids     int             `json:"pids,omitempty"` // bounds processes and threads, the agent being one; 0: the bound stays
}

// MachineNetwork is the one network interface of a machine, eth0.
type MachineNetwork struct {
	MAC      string       `json:"mac,omitempty"` // empty: it stays
	MTU      int          `json:"mtu,omitempty"` // bytes; 0: it stays
	Address  netip.Prefix `json:"address"`       // replaces all others
	Gateway  netip.Addr   `json:"gateway"`
	Resolver netip.Addr   `json:"resolver"` // of names; invalid: /etc/resolv.conf stays
}

// MachineLoad is the answer of GET /load.
type MachineLoad struct {
	Processes int `json:"processes"` // without the threads of the kernel
}
