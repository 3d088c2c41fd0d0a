package supervisor

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// RecordName is the file of a sandbox's directory that holds its record.
const RecordName = "record.json"

// Base is what is recorded of every sandbox.
type Base struct {
	Spec      sandbox.Spec      `json:"spec"`      // as it was asked for
	Resources sandbox.Resources `json:"resources"` // with the defaults
	State     sandbox.State     `json:"state"`
	Reason    string            `json:"reason,omitempty"`
	Group     string            `json:"group"` // control group
}

func (b *Base) base() *Base { return b } //nolint:unused // called by way of Record

// Record is what a later process must know of a sandbox to take it over: a
// pointer to a struct that embeds Base.
type Record interface {
	base() *Base
	// Complete reports whether all is there that a sandbox is found again by.
	Complete() bool
}

// Box is one sandbox.
type Box[R Record, M Machine] struct {
	Dir string // of the sandbox

	// op is held for the whole of a call that changes the sandbox, so that such
	// calls take effect one after another.
	op sync.Mutex

	// mu guards what follows; it is held for moments only.
	mu      sync.Mutex
	rec     R
	machine M // zero while the sandbox is being made and when it is lost
	stop    context.CancelFunc
	ended   chan struct{} // closed when the end of machine is on record
	gone    bool          // destroyed or moved away on purpose: its end is no event
}

// Unlock ends what Hold began.
func (b *Box[R, M]) Unlock() { b.op.Unlock() }

// Record is the sandbox's record, for who makes the sandbox, and may change it, or
// holds it, and may read it. But that its machine ends can be recorded any time:
// ask Status for its state.
func (b *Box[R, M]) Record() R { return b.rec }

// View calls f with the record, which it may read.
func (b *Box[R, M]) View(f func(R)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(b.rec)
}

// Update calls f, which may change the record, and writes it down. The caller
// holds the sandbox.
func (b *Box[R, M]) Update(f func(R)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(b.rec)
	return b.save()
}

// save writes the record. The caller holds mu.
func (b *Box[R, M]) save() error { return WriteRecord(b.Dir, b.rec) }

// WriteRecord replaces the record in a directory, so that a reader sees the old or
// the new one. It does not wait for the disk: sandboxes do not survive the host's
// end anyway.
func WriteRecord(dir string, record any) error {
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, RecordName)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// ReadRecord reads the record in a directory.
func ReadRecord(dir string, record any) error {
	data, err := os.ReadFile(filepath.Join(dir, RecordName))
	if err != nil {
		return err
	}
	return json.Unmarshal(data, record)
}

// load reads the record of the sandbox that must be called id.
func (b *Box[R, M]) load(id string) error {
	if err := ReadRecord(b.Dir, &b.rec); err != nil {
		return err
	}
	if base := b.rec.base(); base.Spec.ID != id || !b.rec.Complete() {
		return fmt.Errorf("damaged record of sandbox %q", base.Spec.ID)
	}
	return nil
}

// Status is the sandbox as the outside sees it.
func (b *Box[R, M]) Status() sandbox.Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	base := b.rec.base()
	return sandbox.Status{ID: base.Spec.ID, State: base.State, Reason: base.Reason, Spec: base.Spec.Clone()}
}

// Live returns the machine of a sandbox that is in one of the states. It fails
// with Conflict.
func (b *Box[R, M]) Live(op string, states ...sandbox.State) (M, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var none M
	base := b.rec.base()
	if b.machine != none && slices.Contains(states, base.State) {
		return b.machine, nil
	}
	if base.Reason != "" {
		return none, sandbox.Errorf(op, sandbox.Conflict, base.Spec.ID, "the sandbox is in state %s: %s", base.State, base.Reason)
	}
	return none, sandbox.Errorf(op, sandbox.Conflict, base.Spec.ID, "the sandbox is %s", base.State)
}

// settleTimeout bounds how long the kernel may take to end a process that has much memory.
const settleTimeout = 10 * time.Second

// settle waits until the end of a machine that is ending is on record, so that
// nobody is told of a running sandbox that no longer answers.
func (b *Box[R, M]) settle() {
	b.mu.Lock()
	m, ended := b.machine, b.ended
	b.mu.Unlock()
	var none M
	if m == none || ended == nil || !m.Ending() {
		return
	}
	select {
	case <-ended:
	case <-time.After(settleTimeout):
	}
}

// detach lets the machine go without ending it.
func (b *Box[R, M]) detach() {
	b.mu.Lock()
	stop := b.stop
	b.mu.Unlock()
	if stop != nil {
		stop()
	}
}
