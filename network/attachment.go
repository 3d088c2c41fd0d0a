package network

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"

	"github.com/atoll-run/atoll/sandbox"
)

const (
	linkPrefix = "atl" // of the host's end of every sandbox link, of every node
	guestLink  = "eth0"
	blockBits  = 30 // each sandbox has a /30: gateway .1, sandbox .2
)

// block is the /30 of one sandbox. Everything in the kernel that belongs to the
// sandbox is named after it, so that names are unique wherever addresses are.
type block netip.Prefix

func (b block) gateway() netip.Addr { return netip.Prefix(b).Addr().Next() }
func (b block) address() netip.Addr { return b.gateway().Next() }

// key is the base address in hexadecimal, 8 characters.
func (b block) key() string {
	a := netip.Prefix(b).Addr().As4()
	return hex.EncodeToString(a[:])
}

// device is the name of the host's end of the link. The kernel lets a name
// exist once: who makes the device owns the addresses.
func (b block) device() string { return linkPrefix + b.key() }

// blockOf is the inverse of device.
func blockOf(device string) (block, bool) {
	raw, err := hex.DecodeString(strings.TrimPrefix(device, linkPrefix))
	if err != nil || len(raw) != 4 || !strings.HasPrefix(device, linkPrefix) || raw[3]&3 != 0 {
		return block{}, false
	}
	return block(netip.PrefixFrom(netip.AddrFrom4([4]byte(raw)), blockBits)), true
}

// blocks divides a pool: the first sixty-fourth gives each node a service
// address, the rest goes to sandboxes.
type blocks struct {
	base            uint32
	services, total uint32
}

func blocksOf(pool netip.Prefix) blocks {
	a := pool.Masked().Addr().As4()
	total := uint32(1) << (blockBits - pool.Bits())
	return blocks{base: binary.BigEndian.Uint32(a[:]), services: max(4, total/64), total: total}
}

func (b blocks) at(i uint32) block {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], b.base+4*i)
	return block(netip.PrefixFrom(netip.AddrFrom4(a), blockBits))
}

// Attachment is one sandbox's place in the network.
type Attachment struct {
	ID     string                `json:"id"`
	Policy sandbox.NetworkPolicy `json:"policy"`
	Link   sandbox.Link          `json:"link"`
}

// attachment is an Attachment at work.
type attachment struct {
	Attachment
	block   block
	rules   atomic.Pointer[rules] // replaced as a whole by Update
	flows   flows                 // what this process carries for it
	queries *rate.Limiter         // of names
	pending atomic.Int32          // questions in flight

	mu   sync.Mutex // held by the one call that changes the attachment
	gone bool       // detached, or never finished; guarded by mu
}

func newAttachment() *attachment {
	return &attachment{queries: rate.NewLimiter(queriesPerSec, queryBurst)}
}

// enter counts a question in flight and reports whether there may be one more.
func (a *attachment) enter() bool {
	if a.pending.Add(1) > maxOwnQueries {
		a.pending.Add(-1)
		return false
	}
	return true
}

func (a *attachment) exit() { a.pending.Add(-1) }

// records keeps one small file per attachment. The kernel's state is lost with
// the host, and so may these files be: they are renamed into place, not synced.
type records struct{ dir string }

func (r records) path(id string) string { return filepath.Join(r.dir, id+".json") }

func (r records) put(a Attachment) error {
	raw, err := json.Marshal(a)
	if err != nil {
		return err
	}
	tmp := r.path(a.ID) + ".new"
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, r.path(a.ID))
}

func (r records) remove(id string) error {
	if err := os.Remove(r.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// all returns every readable record; damaged ones are dropped, for what they
// described is then removed as a leftover.
func (r records) all() ([]Attachment, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, err
	}
	var out []Attachment
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || !sandbox.ValidID(id) {
			continue
		}
		raw, err := os.ReadFile(r.path(id))
		if err != nil {
			return nil, err
		}
		var a Attachment
		if json.Unmarshal(raw, &a) != nil || a.ID != id {
			if err := r.remove(id); err != nil {
				return nil, err
			}
			continue
		}
		out = append(out, a)
	}
	return out, nil
}
