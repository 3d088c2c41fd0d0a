package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/atoll-run/atoll/runtime/process"
	"github.com/atoll-run/atoll/sandbox"
)

// record is what a later process must know of a sandbox to take it over.
type record struct {
	Spec      sandbox.Spec      `json:"spec"`      // as it was asked for
	Resources sandbox.Resources `json:"resources"` // with the defaults
	State     sandbox.State     `json:"state"`
	Reason    string            `json:"reason,omitempty"`
	Sentry    *process.Process  `json:"sentry,omitempty"`
	Gofer     *process.Process  `json:"gofer,omitempty"`
	Images    images            `json:"images"`
	Group     string            `json:"group"` // control group
}

// shape is what the sandbox's sentry is told at boot.
func (r record) shape() shape {
	return shape{root: r.Spec.Root.Path, images: r.Images, res: r.Resources}
}

// images names the images of ours that a sandbox uses, in Runtime.images.
type images struct {
	Agent string `json:"agent"`
	Host  string `json:"host,omitempty"` // for RootHost
}

// list returns the names.
func (i images) list() []string {
	if i.Host == "" {
		return []string{i.Agent}
	}
	return []string{i.Agent, i.Host}
}

// box is one sandbox.
type box struct {
	dir string

	// op is held for the whole of a call that changes the sandbox, so that such
	// calls take effect one after another.
	op sync.Mutex

	// mu guards what follows; it is held for moments only.
	mu     sync.Mutex
	rec    record
	sentry *sentry // nil while the sandbox is being made and when it is lost
	stop   context.CancelFunc
	ended  chan struct{} // closed when the end of sentry is on record
	ooms   int64         // processes killed for want of memory, as far as reported
	gone   bool          // destroyed or moved away on purpose: its end is no event
}

// settle waits until the end of a sentry that is dying is on record, so that
// nobody is told of a running sandbox that no longer answers.
func (b *box) settle() {
	b.mu.Lock()
	s, ended := b.sentry, b.ended
	b.mu.Unlock()
	if s == nil || ended == nil || !s.proc.Ending() {
		return
	}
	select {
	case <-ended:
	case <-time.After(settleTimeout):
	}
}

// settleTimeout bounds how long the kernel may take to end a process that has much memory.
const settleTimeout = 10 * time.Second

// status is the sandbox as the outside sees it.
func (b *box) status() sandbox.Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	return sandbox.Status{ID: b.rec.Spec.ID, State: b.rec.State, Reason: b.rec.Reason, Spec: b.rec.Spec.Clone()}
}

// live returns the sentry of a sandbox that is in one of the states.
func (b *box) live(op string, states ...sandbox.State) (*sentry, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range states {
		if b.rec.State == s && b.sentry != nil {
			return b.sentry, nil
		}
	}
	err := sandbox.Errorf(op, sandbox.Conflict, b.rec.Spec.ID, "the sandbox is %s", b.rec.State)
	if b.rec.Reason != "" {
		err = sandbox.Errorf(op, sandbox.Conflict, b.rec.Spec.ID, "the sandbox is in state %s: %s", b.rec.State, b.rec.Reason)
	}
	return nil, err
}

// setState changes the state and writes it down.
func (b *box) setState(s sandbox.State, reason string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rec.State, b.rec.Reason = s, reason
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
// It does not wait for the disk: sandboxes do not survive the host's end anyway.
func writeFile(path string, data []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// detach lets the processes go without ending them.
func (b *box) detach() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.stop != nil {
		b.stop()
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

// watch waits in the background for the sentry's end and reports it.
func (r *Runtime) watch(b *box, s *sentry) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	b.stop, b.ended = cancel, ended
	r.watches.Go(func() {
		defer close(ended)
		defer cancel()
		if err := s.proc.Wait(ctx); err != nil {
			return // let go
		}
		b.mu.Lock()
		if b.gone || b.sentry != s {
			b.mu.Unlock()
			return
		}
		reason := s.causeOfDeath()
		b.rec.State, b.rec.Reason, b.sentry = sandbox.Error, reason, nil
		err := b.save()
		id := b.rec.Spec.ID
		b.mu.Unlock()
		if err != nil {
			r.log.Error("cannot record the end of a sandbox", "sandbox", id, "err", err)
		}
		if s.group.OutOfMemory() > 0 {
			r.events.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventResource, State: sandbox.Error, Reason: reason})
		}
		r.events.Send(sandbox.Event{Sandbox: id, Kind: sandbox.EventState, State: sandbox.Error, Reason: reason})
		if err := s.end(); err != nil {
			r.log.Error("cannot clear up after a sandbox", "sandbox", id, "err", err)
		}
	})
}

// causeOfDeath says why the sentry is no more.
func (s *sentry) causeOfDeath() string {
	if s.group.OutOfMemory() > 0 {
		return "out of memory: the sandbox needed more than its limit and the kernel ended it"
	}
	if words := s.lastWords(); words != nil {
		return fmt.Sprintf("the sentry failed: %v", words)
	}
	return "the sandbox ended: its first process exited or its sentry was killed"
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
