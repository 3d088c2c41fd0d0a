package carry

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"github.com/atoll-run/atoll/arrive"
	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/fetch"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	// lateBehind is how many pieces are under way that nobody asked for: about what is in a long, fat pipe, and no more, since
	// what is asked for comes behind them.
	lateBehind = 16
	// lateAsked is how many are that somebody waits for.
	lateAsked = 32
	// lateEdge is how many pieces of a file's beginning and end come before its middle: they say what is in it.
	lateEdge = 8
	// maxWanted bounds the pieces that wait for their turn. What is asked for beyond that is asked for again.
	maxWanted = 1 << 14
)

// queue says which piece comes next. It is safe for use by several goroutines.
type queue struct {
	mu     sync.Mutex
	files  []*lateFile
	wanted []piece // the first comes first
	moved  time.Time
	change chan struct{} // closed, and replaced, when a piece is wanted or ends
}

// lateFile is a file on its way.
type lateFile struct {
	name string
	f    *os.File
	part chunk.Part
	came []pieceState
	next int // of what comes behind, in the order of edges and middle
	left int // pieces that have not come
}

type pieceState byte

const (
	absent pieceState = iota
	underWay
	here
)

type piece struct {
	file *lateFile
	n    int
}

func newQueue() *queue { return &queue{moved: time.Now(), change: make(chan struct{})} }

func (q *queue) add(name string, f *os.File, p chunk.Part) {
	q.files = append(q.files, &lateFile{name: name, f: f, part: p, came: make([]pieceState, len(p.Chunks)), left: len(p.Chunks)})
}

// close closes the files.
func (q *queue) close() error {
	var errs []error
	for _, f := range q.files {
		errs = append(errs, f.f.Close())
	}
	return errors.Join(errs...)
}

// signal wakes who waits. The caller holds the lock.
func (q *queue) signal() {
	close(q.change)
	q.change = make(chan struct{})
}

// want puts a piece before those that nobody asked for.
func (q *queue) want(w arrive.Want) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, f := range q.files {
		n := w.Offset / arrive.PieceSize
		if f.name == w.File && w.Offset >= 0 && n < int64(len(f.came)) && f.came[n] == absent && len(q.wanted) < maxWanted {
			q.wanted = append(q.wanted, piece{f, int(n)})
			q.signal()
		}
	}
}

// take returns the next piece: one that was asked for, or else one of the others. none is true when there is none now, and done
// when there never will be; changed is closed when that may be different.
func (q *queue) take(asked bool) (p piece, none, done bool, changed <-chan struct{}) {
	q.mu.Lock()
	defer q.mu.Unlock()
	done = true
	for _, f := range q.files {
		done = done && f.left == 0
	}
	for len(q.wanted) > 0 {
		p, q.wanted = q.wanted[0], q.wanted[1:]
		if p.file.came[p.n] == absent {
			p.file.came[p.n] = underWay
			return p, false, false, nil
		}
	}
	for _, f := range q.files {
		for !asked && f.next < len(f.came) {
			n := order(f.next, len(f.came))
			if f.next++; f.came[n] == absent {
				f.came[n] = underWay
				return piece{f, n}, false, false, nil
			}
		}
	}
	return piece{}, true, done, q.change
}

// order returns which of count pieces is the i-th to come: the beginning, the end, and then the middle. It is a pure function.
func order(i, count int) int {
	edge := min(lateEdge, count/2)
	switch {
	case i < edge:
		return i
	case i < 2*edge:
		return count - 2*edge + i
	}
	return i - edge
}

// ended notes that a piece came.
func (q *queue) ended(p piece) {
	q.mu.Lock()
	defer q.mu.Unlock()
	p.file.came[p.n] = here
	p.file.left--
	q.moved = time.Now()
	q.signal()
}

// quiet is for how long nothing has come.
func (q *queue) quiet() time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	return time.Since(q.moved)
}

// run brings all pieces, and makes the snapshot one like all others or takes it away.
func (j *journey) run(ctx context.Context) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(j.c.life, func() { cancel(j.c.life.Err()) })()
	go func() {
		for {
			w, err := j.wants.Next()
			if err != nil {
				return
			}
			j.queue.want(w)
		}
	}()
	var wg sync.WaitGroup
	for i := range lateBehind + lateAsked {
		wg.Go(func() {
			if err := j.work(ctx, i >= lateBehind); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	err := context.Cause(ctx)
	for _, f := range j.queue.files {
		if err == nil {
			err = arrive.Finish(f.f)
		}
	}
	err = errors.Join(err, j.wants.Remove())
	if err == nil {
		err = j.draft.CommitLent(j.beside...)
	}
	if err != nil {
		for _, f := range j.queue.files {
			err = errors.Join(err, arrive.GiveUp(f.f))
		}
		err = errors.Join(err, j.draft.Withdraw(), j.queue.close())
		j.c.cfg.Log.Warn("a snapshot did not come whole, and those who run on it end", "id", j.manifest.ID, "node", j.from, "error", err)
		return
	}
	err = j.queue.close()
	j.c.cfg.Log.Info("a snapshot that was lent is here", "id", j.manifest.ID, "node", j.from, "bytes", j.c.received()-j.before, "took", time.Since(j.began), "error", err)
}

// work brings pieces, one after another.
func (j *journey) work(ctx context.Context, asked bool) error {
	for {
		p, none, done, changed := j.queue.take(asked)
		switch {
		case none && done:
			return nil
		case none:
			select {
			case <-changed:
			case <-ctx.Done():
				return ctx.Err()
			}
		default:
			if err := j.bring(ctx, p); err != nil {
				return err
			}
			j.queue.ended(p)
		}
	}
}

// bring brings one piece, and goes on trying while anything comes.
func (j *journey) bring(ctx context.Context, p piece) error {
	ref := p.file.part.Chunks[p.n]
	at := int64(p.n) * arrive.PieceSize
	for {
		data, err := j.c.fetch.Once(ctx, j.from, fetch.Piece{ID: ref.ID, File: p.file.part.Digest, At: at, Size: ref.Size})
		if err == nil && len(data) != ref.Size {
			err = sandbox.Errorf("carry.Pull", sandbox.Invalid, p.file.name, "a piece has %d bytes, not %d", len(data), ref.Size)
		}
		if err == nil {
			if _, err := p.file.f.WriteAt(data, at); err != nil {
				return fail("carry.Pull", p.file.name, diskKind(err), err)
			}
			return nil
		}
		passes := sandbox.Is(err, sandbox.Unavailable) || sandbox.Is(err, sandbox.Timeout)
		if !passes || ctx.Err() != nil || j.queue.quiet() > min(latePatience, j.c.cfg.Patience) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(latePause):
		}
	}
}
