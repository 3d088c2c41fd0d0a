package carry

import (
	"context"
	"slices"
	"sync"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/transfer"
)

// known is what was found out about files that are likely to be the bases of the next push. Files are named by their digests
// and never change, so that nothing in it goes stale.
type known struct {
	mu      sync.Mutex
	trees   recent[*transfer.Tree]
	indexes recent[*transfer.Index]
	parts   recent[*chunk.Part]
	sent    recent[foretold]
	warming map[chunk.ID]chan struct{} // indexes that are being built; closed when they are there
	theirs  map[string]*recent[bool]   // by peer: files that it had when it was asked last, or was sent
}

// foretold is what sending a file took, as a delta: the next version of it is likely to take as much.
type foretold struct {
	method transfer.Method
	bytes  int64
}

const (
	keptTrees   = 256
	keptSent    = 256
	keptIndexes = 4
	keptTheirs  = 1024    // of each peer
	maxIndexed  = 1 << 30 // bytes of a file whose index is kept, which takes 1/16 of that
)

// recent keeps the last few values.
type recent[T any] struct {
	keys   []chunk.ID // the oldest first
	values map[chunk.ID]T
}

func (r *recent[T]) put(id chunk.ID, v T, limit int) {
	if r.values == nil {
		r.values = make(map[chunk.ID]T)
	}
	if i := slices.Index(r.keys, id); i >= 0 {
		r.keys = slices.Delete(r.keys, i, i+1)
	}
	r.keys = append(r.keys, id)
	r.values[id] = v
	if len(r.keys) > limit {
		delete(r.values, r.keys[0])
		r.keys = slices.Delete(r.keys, 0, 1)
	}
}

// tree returns a file's tree; nil when it is not known.
func (k *known) tree(id chunk.ID) *transfer.Tree {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.trees.values[id]
}

func (k *known) putTree(id chunk.ID, t *transfer.Tree) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.trees.put(id, t, keptTrees)
}

// part returns the chunks of a file; nil when they are not known.
func (k *known) part(id chunk.ID) *chunk.Part {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.parts.values[id]
}

func (k *known) putPart(id chunk.ID, p *chunk.Part) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.parts.put(id, p, keptParts)
}

// index returns a file's index, and builds it unless it is there or on its way.
func (k *known) index(ctx context.Context, id chunk.ID, m transfer.Image) (*transfer.Index, error) {
	k.mu.Lock()
	coming := k.warming[id]
	k.mu.Unlock()
	if coming != nil {
		select {
		case <-coming:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	k.mu.Lock()
	x := k.indexes.values[id]
	k.mu.Unlock()
	if x != nil {
		return x, nil
	}
	return transfer.BuildIndex(ctx, m)
}

// warm builds the index of a file that was pushed, since the next version of it is likely to be next. It returns at once.
func (k *known) warm(ctx context.Context, id chunk.ID, path string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.indexes.values[id] != nil || k.warming[id] != nil {
		return
	}
	if k.warming == nil {
		k.warming = make(map[chunk.ID]chan struct{})
	}
	there := make(chan struct{})
	k.warming[id] = there
	go func() {
		defer close(there)
		m, closer, err := transfer.OpenImage(path)
		var x *transfer.Index
		if err == nil {
			if m.Size <= maxIndexed {
				x, err = transfer.BuildIndex(ctx, m)
			}
			_ = closer.Close()
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.warming, id)
		if err == nil && x != nil { // else the next push builds it
			k.indexes.put(id, x, keptIndexes)
		}
	}()
}

// foretell returns what the next version of a file is expected to take, if it was itself sent as a delta.
func (k *known) foretell(id chunk.ID) (foretold, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f, ok := k.sent.values[id]
	return f, ok
}

// took remembers how a file was sent.
func (k *known) took(id chunk.ID, r FileResult) {
	m, err := transfer.ParseMethod(r.Method)
	if err != nil || m == transfer.Whole {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sent.put(id, foretold{m, r.Wire}, keptSent)
}

// of returns whether a peer is taken to have a file. It may be wrong: files are removed.
func (k *known) of(peer string) func(chunk.ID) bool {
	return func(id chunk.ID) bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		r := k.theirs[peer]
		return r != nil && r.values[id]
	}
}

// note remembers that a peer has a file, or has not.
func (k *known) note(peer string, id chunk.ID, has bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.theirs == nil {
		k.theirs = make(map[string]*recent[bool])
	}
	if k.theirs[peer] == nil {
		k.theirs[peer] = &recent[bool]{}
	}
	k.theirs[peer].put(id, has, keptTheirs)
}
