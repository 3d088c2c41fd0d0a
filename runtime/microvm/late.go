package microvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/atoll-run/atoll/arrive"
	"github.com/atoll-run/atoll/runtime/microvm/pager"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	// headTimeout bounds how long the parts of page files are waited for that say what is in them.
	headTimeout = time.Minute
	headLook    = 10 * time.Millisecond
	headAsk     = 250 * time.Millisecond
)

// awaitHeads waits until the page files of a memory, which are on their way into dir, have come so far that they can be read at
// random: what is at their beginning and at their end.
func (r *Runtime) awaitHeads(ctx context.Context, dir string, o origin, wants *os.File) error {
	ctx, stop := context.WithTimeout(ctx, headTimeout)
	defer stop()
	for _, file := range o.Base {
		for asked := (time.Time{}); ; {
			short, err := file.head(dir, o.Shape.Memory)
			if err == nil {
				break
			}
			if short {
				return fmt.Errorf("%s: %w", file.Name, pager.ErrLost)
			}
			if time.Since(asked) > headAsk {
				arrive.Ask(wants, arrive.Want{File: file.Name})
				arrive.Ask(wants, arrive.Want{File: file.Name, Offset: pagesFixed + file.Bytes})
				asked = time.Now()
			}
			select {
			case <-ctx.Done():
				return sandbox.Errorf("read snapshot", sandbox.Unavailable, "", "%s: %w", file.Name, errors.Join(pager.ErrLost, ctx.Err()))
			case <-time.After(headLook):
			}
		}
	}
	return nil
}

// head reads what must be there of a page file; short: it will never come.
func (p pageFile) head(dir string, size int64) (short bool, err error) {
	f, err := os.Open(filepath.Join(dir, p.Name))
	if err != nil {
		return true, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Size() == 0 {
		return true, errors.Join(err, errDamaged)
	}
	_, err = p.layer(f, size)
	return false, err
}

// settled fails as long as a part of what a machine was restored from is on its way: it could not be saved whole.
func settled(dir string, o origin) error {
	for _, p := range o.Base {
		if late, err := arrive.Late(filepath.Join(dir, p.Name)); err != nil {
			return err
		} else if late {
			return sandbox.Errorf("save", sandbox.Conflict, "", "a part of its memory is still on its way from another node").
				WithHint("try again when that is here")
		}
	}
	return nil
}
