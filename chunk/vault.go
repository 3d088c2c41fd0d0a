package chunk

import (
	"context"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Vault is a store that is collected while others write to it. A chunk stays when a ref's manifest has it, when a lease has
// put it or asked for it and is not released yet, or when that happened since the collection began.
//
// Writers put chunks and set their ref under a Lease, and release it then. That is enough: the collector takes over the
// leases before it reads the refs, and a lease that ended before has its ref among these.
type Vault struct {
	Store

	gc sync.Mutex // held while it collects

	mu     sync.Mutex
	leases map[*Lease]struct{}
	fresh  map[ID]struct{} // what leases touched since the collection under way began; nil when there is none
}

// NewVault returns a vault over a store, which from then on is written by the vault's leases only.
func NewVault(s Store) *Vault { return &Vault{Store: s, leases: make(map[*Lease]struct{})} }

// Lease protects what is put through it until it is released. It is safe for use by several goroutines.
type Lease struct {
	vault *Vault
	held  map[ID]struct{} // guarded by vault.mu
}

// Lease returns a new lease, which must be released.
func (v *Vault) Lease() *Lease {
	l := &Lease{vault: v, held: make(map[ID]struct{})}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.leases[l] = struct{}{}
	return l
}

// Release ends the lease. It can be called again.
func (l *Lease) Release() {
	l.vault.mu.Lock()
	defer l.vault.mu.Unlock()
	delete(l.vault.leases, l)
}

// touch must come before looking whether a chunk is there.
func (l *Lease) touch(ids ...ID) {
	l.vault.mu.Lock()
	defer l.vault.mu.Unlock()
	for _, id := range ids {
		l.held[id] = struct{}{}
		if l.vault.fresh != nil {
			l.vault.fresh[id] = struct{}{}
		}
	}
}

// Put is Store.Put under the lease.
func (l *Lease) Put(ctx context.Context, data []byte) (ID, error) {
	if err := CheckSize(len(data)); err != nil {
		return ID{}, err
	}
	l.touch(Sum(data))
	return l.vault.Put(ctx, data)
}

// Missing is Store.Missing; those that are there stay as long as the lease.
func (l *Lease) Missing(ctx context.Context, ids []ID) ([]ID, error) {
	l.touch(ids...)
	return l.vault.Missing(ctx, ids)
}

// Collected is what a collection did.
type Collected struct {
	Kept, Removed int
	Bytes         int64 // removed, as they were kept
}

// Collect removes the chunks that nothing leads to. It removes nothing when a ref's manifest cannot be read: better too much
// than a hole. now is compared with when a chunk was written, see Store.Grace.
func (v *Vault) Collect(ctx context.Context, now time.Time) (Collected, error) {
	v.gc.Lock()
	defer v.gc.Unlock()
	v.begin()
	defer v.end()
	keep, err := v.reachable(ctx)
	if err != nil {
		return Collected{}, err
	}
	var done Collected
	err = v.Each(ctx, func(e Entry) error {
		if _, ok := keep[e.ID]; ok || now.Sub(e.Written) < v.Grace() {
			done.Kept++
			return nil
		}
		removed, err := v.remove(ctx, e.ID)
		switch {
		case err != nil:
			return err
		case removed:
			done.Removed++
			done.Bytes += e.Size
		default:
			done.Kept++
		}
		return nil
	})
	return done, err
}

func (v *Vault) begin() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.fresh = make(map[ID]struct{})
	for l := range v.leases {
		for id := range l.held {
			v.fresh[id] = struct{}{}
		}
	}
}

func (v *Vault) end() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.fresh = nil
}

// reachable returns all chunks that a ref leads to.
func (v *Vault) reachable(ctx context.Context) (map[ID]struct{}, error) {
	refs, err := v.Refs(ctx)
	if err != nil {
		return nil, err
	}
	keep := make(map[ID]struct{})
	for name, id := range refs {
		if _, seen := keep[id]; seen {
			continue
		}
		keep[id] = struct{}{}
		m, err := GetManifest(ctx, v, id)
		if err != nil {
			return nil, sandbox.E("chunk.Collect", "", name, err)
		}
		for _, p := range m.Parts {
			for _, c := range p.Chunks {
				keep[c.ID] = struct{}{}
			}
		}
	}
	return keep, nil
}

// remove deletes a chunk unless a lease has touched it meanwhile. The lock is held throughout: a lease that wants the chunk
// now waits, and finds that it is gone.
func (v *Vault) remove(ctx context.Context, id ID) (bool, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.fresh[id]; ok {
		return false, nil
	}
	return true, v.Delete(ctx, id)
}
