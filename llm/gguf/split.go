package gguf

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"sort"
	"strconv"
)

// The keys of a file that is one of several parts of a model.
const (
	keySplitNo      = "split.no"
	keySplitCount   = "split.count"
	keySplitTensors = "split.tensors.count"
)

// maxParts bounds the parts of a model; the largest in use has below 100.
const maxParts = 1000

var partName = regexp.MustCompile(`^(.*)-(\d{5})-of-(\d{5})\.gguf$`)

// PartNames returns the names, or addresses, of all parts of a model of which name is one, by the custom of calling them
// NAME-00001-of-00003.gguf and so on; nil when name is no such name.
func PartNames(name string) []string {
	m := partName.FindStringSubmatch(name)
	if m == nil {
		return nil
	}
	no, _ := strconv.Atoi(m[2]) // five digits
	count, _ := strconv.Atoi(m[3])
	if no < 1 || no > count || count > maxParts {
		return nil
	}
	names := make([]string, count)
	for i := range names {
		names[i] = fmt.Sprintf("%s-%05d-of-%s.gguf", m[1], i+1, m[3])
	}
	return names
}

// Join returns the one file that parts are of, as if it were their bytes side by side: see Concat. sizes are the bytes of
// each. The metadata is the first part's. It fails when they are not the parts of one model, all of them, in order.
func Join(parts []*File, sizes []int64) (*File, error) {
	if len(parts) == 0 || len(parts) > maxParts {
		return nil, fmt.Errorf("a model of %d parts", len(parts))
	}
	whole := *parts[0]
	whole.Meta, whole.Tensors = parts[0].Meta.Clone(), nil
	base := int64(0)
	for i, p := range parts {
		no, hasNo := p.Meta.Int(keySplitNo)
		count, hasCount := p.Meta.Int(keySplitCount)
		if !hasNo || !hasCount || no != int64(i) || count != int64(len(parts)) {
			return nil, fmt.Errorf("part %d of %d says that it is part %d of %d", i+1, len(parts), no+1, count)
		}
		for _, t := range p.Tensors {
			t.Offset += base
			whole.Tensors = append(whole.Tensors, t)
		}
		base += sizes[i]
	}
	if n, ok := whole.Meta.Int(keySplitTensors); ok && n != int64(len(whole.Tensors)) {
		return nil, fmt.Errorf("%d tensors in all parts, not %d as the first says", len(whole.Tensors), n)
	}
	if len(whole.Tensors) > maxTensors {
		return nil, errors.New("too many tensors")
	}
	for _, key := range []string{keySplitNo, keySplitCount, keySplitTensors} {
		whole.Meta.Delete(key)
	}
	return &whole, whole.place(base)
}

// Concat gives the bytes of parts as if they lay side by side. sizes are the bytes of each.
func Concat(parts []io.ReaderAt, sizes []int64) io.ReaderAt {
	c := &concat{parts: parts, ends: make([]int64, len(sizes))}
	end := int64(0)
	for i, n := range sizes {
		end += n
		c.ends[i] = end
	}
	return c
}

type concat struct {
	parts []io.ReaderAt
	ends  []int64
}

// ReadAt implements io.ReaderAt.
func (c *concat) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	i := sort.Search(len(c.ends), func(i int) bool { return c.ends[i] > off })
	for ; i < len(c.parts) && done < len(p); i++ {
		start := int64(0)
		if i > 0 {
			start = c.ends[i-1]
		}
		want := min(int64(len(p)-done), c.ends[i]-off)
		n, err := c.parts[i].ReadAt(p[done:done+int(want)], off-start)
		done, off = done+n, off+int64(n)
		if int64(n) < want {
			return done, err
		}
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}
