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
			size, err := file.head(dir, o.Shape.Memory)
			if err == nil {
				break
			}
			if size == 0 {
				return fmt.Errorf("%s: %w", file.Name, pager.ErrLost)
			}
			if time.Since(asked) > headAsk {
				file.askHead(wants, size)
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

// askHead asks for what is before the pages of a file of size bytes, and for the sums behind them: all that is no pages lies in so
// many bytes at its beginning or its end.
func (p pageFile) askHead(wants *os.File, size int64) {
	rest := size - p.Bytes
	for at := int64(0); at < rest; at += arrive.PieceSize {
		arrive.Ask(wants, arrive.Want{File: p.Name, Offset: at})
		arrive.Ask(wants, arrive.Want{File: p.Name, Offset: size - 1 - at})
	}
	arrive.Ask(wants, arrive.Want{File: p.Name, Offset: max(size-rest, 0)})
}

// head reads what must be there of a page file, of a memory of so many bytes. When it is not there yet, size is the whole file's in
// bytes, or 0 if it will never come.
func (p pageFile) head(dir string, memory int64) (size int64, err error) {
	f, err := os.Open(filepath.Join(dir, p.Name))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() == 0 {
		return 0, errors.Join(err, errDamaged)
	}
	_, err = p.layer(f, memory)
	return info.Size(), err
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
