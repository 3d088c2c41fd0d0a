package wire

import (
	"encoding/binary"
	"errors"
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

// Machine is the question on the serial port by which the runtime gives a machine
// that began as another's copy its own identity. The answer is empty when all is
// done, and says what failed otherwise. Absent fields change nothing.
type Machine struct {
	Time     time.Time       // sets the clock; zero: it stays
	Entropy  []byte          // seeds the kernel's random numbers, at most 4096 bytes
	Hostname string          // at most 255 bytes
	Network  *MachineNetwork // nil: it stays
	Pids     int             // bounds processes and threads, the agent being one; 0: the bound stays
	Rest     bool            // the machine is about to be frozen: the agent does nothing but wait for the next question
}

// MachineNetwork is the one network interface of a machine, eth0.
type MachineNetwork struct {
	MAC      string       // empty: it stays
	MTU      int          // bytes; 0: it stays
	Address  netip.Prefix // IPv4, replaces all others
	Gateway  netip.Addr   // IPv4; invalid: none
	Resolver netip.Addr   // IPv4, of names; invalid: /etc/resolv.conf stays
}

// The question in bytes, all numbers big-endian: the time in nanoseconds since 1970
// (8, 0 for none), Rest (1), Pids (4), MTU (4), the address (4) with its length (1, 0 for no
// network), gateway and resolver (4 each, 0 for none), and then MAC, Hostname and
// Entropy, each with its length (2) before it. JSON would have an emulated machine
// translate thousands of pieces of code for this one message.
const machineHead = 8 + 1 + 4 + 4 + 4 + 1 + 4 + 4

// AppendBinary appends the question.
func (m Machine) AppendBinary(b []byte) ([]byte, error) {
	var n MachineNetwork
	if m.Network != nil {
		n = *m.Network
	}
	var address, gateway, resolver [4]byte
	for to, from := range map[*[4]byte]netip.Addr{&address: n.Address.Addr(), &gateway: n.Gateway, &resolver: n.Resolver} {
		if from.IsValid() && !from.Is4() {
			return nil, errors.New("a machine takes IPv4 addresses only")
		}
		if from.IsValid() {
			*to = from.As4()
		}
	}
	var at, bits int64
	if !m.Time.IsZero() {
		at = m.Time.UnixNano()
	}
	if m.Network != nil {
		bits = int64(n.Address.Bits())
	}
	if m.Network != nil && bits <= 0 || len(m.Hostname) > 255 || len(n.MAC) > 255 || len(m.Entropy) > 4096 || m.Pids < 0 || n.MTU < 0 {
		return nil, errors.New("a machine's name, entropy, network or processes are out of bounds")
	}
	b = binary.BigEndian.AppendUint64(b, uint64(at))
	var rest byte
	if m.Rest {
		rest = 1
	}
	b = append(b, rest)
	b = binary.BigEndian.AppendUint32(b, uint32(min(m.Pids, 1<<31-1)))
	b = binary.BigEndian.AppendUint32(b, uint32(min(n.MTU, 1<<31-1)))
	b = append(append(b, address[:]...), byte(bits))
	b = append(append(b, gateway[:]...), resolver[:]...)
	for _, text := range []string{n.MAC, m.Hostname, string(m.Entropy)} {
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(text))), text...)
	}
	return b, nil
}

// ParseMachine reads a question. What it returns holds parts of b.
func ParseMachine(b []byte) (m Machine, err error) {
	bad := errors.New("not a machine's identity: the runtime and the agent do not belong together")
	if len(b) < machineHead {
		return m, bad
	}
	if at := int64(binary.BigEndian.Uint64(b)); at != 0 {
		m.Time = time.Unix(0, at)
	}
	m.Rest = b[8] == 1
	m.Pids = int(binary.BigEndian.Uint32(b[9:]) & (1<<31 - 1))
	var n MachineNetwork
	n.MTU = int(binary.BigEndian.Uint32(b[13:]) & (1<<31 - 1))
	bits := int(b[21])
	n.Address = netip.PrefixFrom(netip.AddrFrom4([4]byte(b[17:21])), bits)
	n.Gateway, n.Resolver = address4(b[22:26]), address4(b[26:30])
	var mac, hostname []byte
	rest := b[machineHead:]
	for _, to := range []*[]byte{&mac, &hostname, &m.Entropy} {
		if len(rest) < 2 || len(rest)-2 < int(binary.BigEndian.Uint16(rest)) {
			return m, bad
		}
		end := 2 + int(binary.BigEndian.Uint16(rest))
		*to, rest = rest[2:end:end], rest[end:]
	}
	if len(rest) > 0 || bits > 32 || b[8] > 1 {
		return m, bad
	}
	n.MAC, m.Hostname = string(mac), string(hostname)
	if bits > 0 {
		m.Network = &n
	}
	return m, nil
}

// address4 is an address, invalid if it is all zeros.
func address4(b []byte) netip.Addr {
	if a := netip.AddrFrom4([4]byte(b)); a != netip.IPv4Unspecified() {
		return a
	}
	return netip.Addr{}
}

// MachineLoad is the answer of GET /load.
type MachineLoad struct {
	Processes int `json:"processes"` // without the threads of the kernel
}
