package carry

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/atoll-run/atoll/arrive"
	"github.com/atoll-run/atoll/fetch"
	"github.com/atoll-run/atoll/sandbox"
)

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
			j.queue.want(w, time.Now())
		}
	}()
	var wg sync.WaitGroup
	for i := range lateNeeded + lateRuns {
		wg.Go(func() {
			if err := j.work(ctx, i < lateNeeded); err != nil {
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
	j.c.cfg.Log.Info("a snapshot that was lent is here", "id", j.manifest.ID, "node", j.from, "bytes", j.c.received()-j.before, "took", time.Since(j.began), "pieces", j.queue.counts(), "error", err)
}

// work brings pieces; needed: only those that somebody waits for.
func (j *journey) work(ctx context.Context, needed bool) error {
	for {
		run, done, changed := j.queue.take(needed, time.Now())
		switch {
		case len(run) > 0:
			if err := j.bringRun(ctx, run); err != nil {
				return err
			}
		case done:
			return nil
		default:
			select {
			case <-changed:
			case <-time.After(lateCalm): // nobody may wait for anything any more
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}

// bringRun brings pieces of one file, several by one request. What that does not bring is asked for piece by piece.
func (j *journey) bringRun(ctx context.Context, run []piece) error {
	if len(run) > 1 {
		pieces := make([]fetch.Piece, len(run))
		for i, p := range run {
			pieces[i] = p.chunk()
		}
		var disk error
		n, err := j.c.fetch.Run(ctx, j.from, pieces, func(i int, data []byte) error {
			disk = j.put(run[i], data)
			return disk
		})
		if disk != nil {
			return disk
		}
		if run = run[n:]; err != nil {
			j.c.cfg.Log.Debug("pieces are asked for one by one", "node", j.from, "left", len(run), "error", err)
		}
	}
	for _, p := range run {
		if err := j.bring(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// put writes a piece that has come.
func (j *journey) put(p piece, data []byte) error {
	if _, err := p.file.f.WriteAt(data, int64(p.n)*arrive.PieceSize); err != nil {
		return fail("carry.Pull", p.file.name, diskKind(err), err)
	}
	j.queue.ended(p)
	return nil
}

// bring brings one piece, and goes on trying while anything comes.
func (j *journey) bring(ctx context.Context, p piece) error {
	c := p.chunk()
	for {
		data, err := j.c.fetch.Once(ctx, j.from, c)
		if err == nil && len(data) != c.Size {
			err = sandbox.Errorf("carry.Pull", sandbox.Invalid, p.file.name, "a piece has %d bytes, not %d", len(data), c.Size)
		}
		if err == nil {
			return j.put(p, data)
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
