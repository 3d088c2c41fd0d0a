package microvm

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/process"
	"github.com/atoll-run/atoll/sandbox"
)

// record is what a later process must know of a sandbox to take it over.
type record struct {
	Spec      sandbox.Spec      `json:"spec"`      // as it was asked for
	Resources sandbox.Resources `json:"resources"` // with the defaults
	State     sandbox.State     `json:"state"`
	Reason    string            `json:"reason,omitempty"`
	Process   *process.Process  `json:"process,omitempty"`
	Group     string            `json:"group"` // control group
	Tap       string            `json:"tap,omitempty"`
	// Origin is what the machine maps and which layers its disk has by now; the
	// uppermost is being written.
	Origin origin `json:"origin"`
}

// box is one sandbox.
type box struct {
	dir string

	// op is held for the whole of a call that changes the sandbox, so that such
	// calls take effect one after another.
	op sync.Mutex

	// mu guards what follows; it is held for moments only.
	mu    sync.Mutex
	rec   record
	vm    *vm // nil while the sandbox is being made and when it is lost
	stop  context.CancelFunc
	ended chan struct{} // closed when the end of vm is on record
	gone  bool          // destroyed or moved away on purpose: its end is no event
}

// settleTimeout bounds how long the kernel may take to end a process that has much memory.
const settleTimeout = 10 * time.Second

// settle waits until the end of a machine that is ending is on record, so that
// nobody is told of a running sandbox that no longer answers.
func (b *box) settle() {
	b.mu.Lock()
	v, ended := b.vm, b.ended
	b.mu.Unlock()
	if v == nil || ended == nil {
		return
	}
	select {
	case <-v.machine.Ended():
	default:
		if !v.machine.Process().Ending() {
			return
		}
	}
	select {
	case <-ended:
	case <-time.After(settleTimeout):
	}
}

// status is the sandbox as the outside sees it.
func (b *box) status() sandbox.Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	return sandbox.Status{ID: b.rec.Spec.ID, State: b.rec.State, Reason: b.rec.Reason, Spec: b.rec.Spec.Clone()}
}

// live returns the machine of a sandbox that is in one of the states.
func (b *box) live(op string, states ...sandbox.State) (*vm, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range states {
		if b.rec.State == s && b.vm != nil {
			return b.vm, nil
		}
	}
	if b.rec.Reason != "" {
		return nil, sandbox.Errorf(op, sandbox.Conflict, b.rec.Spec.ID, "the sandbox is in state %s: %s", b.rec.State, b.rec.Reason)
	}
	return nil, sandbox.Errorf(op, sandbox.Conflict, b.rec.Spec.ID, "the sandbox is %s", b.rec.State)
}

// update changes the record and writes it down.
func (b *box) update(change func(*record)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	change(&b.rec)
	return b.save()
}

// save writes the record. The caller holds mu.
func (b *box) save() error {
	data, err := json.Marshal(b.rec)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(b.dir, recordName), data)
}

const recordName = "record.json"

// writeFile replaces a file so that a reader sees the old or the new content.
// It does not wait for the disk: machines do not survive the host's end anyway.
func writeFile(path string, data []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// detach lets the machine go without ending it.
func (b *box) detach() {
	b.mu.Lock()
	stop := b.stop
	b.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// box finds a sandbox.
func (r *Runtime) box(op, id string) (*box, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if b := r.boxes[id]; b != nil {
		return b, nil
	}
	return nil, sandbox.Errorf(op, sandbox.NotFound, id, "no such sandbox")
}

// claim reserves an ID and makes its directory.
func (r *Runtime) claim(op string, rec record) (*box, error) {
	id := rec.Spec.ID
	b := &box{dir: filepath.Join(r.cfg.Dir, "s", id), rec: rec}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, sandbox.Errorf(op, sandbox.Unavailable, id, "the runtime is closed")
	}
	if r.boxes[id] != nil {
		return nil, sandbox.Errorf(op, sandbox.Exists, id, "the id is taken")
	}
	if err := r.admit(rec.Resources.Memory); err != nil {
		return nil, err
	}
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		return nil, sandbox.E(op, ioKind(err), id, err)
	}
	r.boxes[id] = b
	return b, nil
}

// forget removes a sandbox's directory and frees its ID.
func (r *Runtime) forget(b *box) error {
	err := os.RemoveAll(b.dir)
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.boxes, b.rec.Spec.ID)
	return err
}

// watch waits in the background for the machine's end and reports it. The caller
// holds b.mu.
func (r *Runtime) watch(b *box, v *vm) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	b.stop, b.ended = cancel, ended
	r.watches.Go(func() {
		defer close(ended)
		defer cancel()
		select {
		case <-v.machine.Ended():
		case <-ctx.Done():
			v.hangUp()
			if err := v.machine.Close(); err != nil {
				r.log.Warn("letting a machine go", "sandbox", b.rec.Spec.ID, "err", err)
			}
			return
		}
		b.mu.Lock()
		if b.gone || b.vm != v {
			b.mu.Unlock()
			return
		}
		reason, starved := v.cause(), v.group.OutOfMemory() > 0
		b.rec.State, b.rec.Reason, b.vm = sandbox.Error, reason, nil
		err := b.save()
		id := b.rec.Spec.ID
		b.mu.Unlock()
		if err != nil {
			r.log.Error("cannot record the end of a sandbox", "sandbox", id, "err", err)
		}
		if starved {
			r.events.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventResource, State: sandbox.Error, Reason: reason})
		}
		r.events.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventState, State: sandbox.Error, Reason: reason})
		if err := v.end(); err != nil {
			r.log.Error("cannot clear up after a sandbox", "sandbox", id, "err", err)
		}
	})
}

// ioKind tells a full disk from other failures.
func ioKind(err error) sandbox.Kind {
	if isFull(err) {
		return sandbox.Exhausted
	}
	if k := sandbox.KindOf(err); k != sandbox.Internal {
		return k
	}
	if errors.Is(err, os.ErrExist) {
		return sandbox.Exists
	}
	return sandbox.Internal
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
