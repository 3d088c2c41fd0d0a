package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// wanted are the modules of a machine, unless its kernel has them built in: the
// buses, the devices, the file systems.
var wanted = []string{
	"virtio_mmio", "virtio_pci", "virtio_console", "virtio_blk", "erofs", "overlay", "ext4",
	"virtio_net", "virtio_balloon", "virtio_rng",
}

const builtinName = "modules.builtin"

// module is one to be loaded.
type module struct {
	name string
	data []byte // ELF
}

// moduleName returns the name of the module in a file: "virtio-rng.ko.zst" is
// virtio_rng. It is empty for other files.
func moduleName(file string) string {
	base, rest, ok := strings.Cut(path.Base(file), ".ko")
	if !ok || rest != "" && rest[0] != '.' {
		return ""
	}
	return strings.ReplaceAll(base, "-", "_")
}

// gatherModules links the modules below from, and the list of built-in ones,
// into the directory to.
func gatherModules(from, to string) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || moduleName(p) == "" && d.Name() != builtinName {
			return err
		}
		abs, err := filepath.Abs(p)
		if err != nil {
			return err
		}
		err = os.Symlink(abs, filepath.Join(to, d.Name()))
		if errors.Is(err, fs.ErrExist) {
			return nil // the same module twice, as with updates of drivers
		}
		return err
	})
}

// missingModules says that a kernel lacks modules.
type missingModules []string

func (m missingModules) Error() string {
	return "the kernel has no modules " + strings.Join(m, ", ")
}

// chooseModules returns the wanted modules in dir and all that those need, in an
// order in which they can be loaded. The error may be missingModules.
func chooseModules(dir string) ([]module, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	files := map[string]string{}
	for _, e := range entries {
		if name := moduleName(e.Name()); name != "" {
			files[name] = filepath.Join(dir, e.Name())
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, builtinName))
	if err != nil {
		return nil, err
	}
	builtin := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		builtin[moduleName(strings.TrimSpace(line))] = true
	}
	return closure(wanted, builtin, func(name string) (module, error) {
		file, ok := files[name]
		if !ok {
			return module{}, fs.ErrNotExist
		}
		data, err := readModule(file)
		return module{name, data}, err
	})
}

// readModule reads a module's file and decompresses it.
func readModule(file string) ([]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r, err := decompress(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	plain, err := io.ReadAll(io.LimitReader(r, maxKernel))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return unsigned(plain), nil
}

// unsigned returns a module without the signature appended to it. What we load
// comes from a package that was checked, and checking again takes an emulated
// processor longer than all else about a module. The kernel notes that as a taint.
func unsigned(data []byte) []byte {
	// The signature, its description of 12 bytes, whose last 4 are the length of
	// the signature, and these words.
	const words, description = "~Module signature appended~\n", 12
	body, ok := bytes.CutSuffix(data, []byte(words))
	if !ok || len(body) < description {
		return data
	}
	size := int64(binary.BigEndian.Uint32(body[len(body)-4:]))
	if size > int64(len(body)-description) {
		return data
	}
	return body[:int64(len(body)-description)-size]
}

// closure orders the named modules and what they depend on.
func closure(names []string, builtin map[string]bool, read func(string) (module, error)) ([]module, error) {
	var order []module
	var missing missingModules
	seen := map[string]bool{}
	var visit func(name string, optional bool) error
	visit = func(name string, optional bool) error {
		if seen[name] || builtin[name] {
			return nil
		}
		seen[name] = true
		m, err := read(name)
		if errors.Is(err, fs.ErrNotExist) {
			if !optional {
				missing = append(missing, name)
			}
			return nil
		}
		if err != nil {
			return err
		}
		needs, hints, err := dependencies(m.data)
		if err != nil {
			return sandbox.Errorf("kernel.closure", sandbox.Invalid, name, "module: %w", err)
		}
		for _, need := range needs {
			if err := visit(need, false); err != nil {
				return err
			}
		}
		for _, hint := range hints {
			if err := visit(hint, true); err != nil {
				return err
			}
		}
		order = append(order, m)
		return nil
	}
	for _, name := range names {
		if err := visit(name, false); err != nil {
			return nil, err
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return nil, missing
	}
	return order, nil
}

// dependencies reads from a module which others it needs, and which it would
// like to be there before it ("softdep"; crypto drivers, mostly).
func dependencies(data []byte) (needs, hints []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, nil, errors.New("no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, nil, err
	}
	for _, field := range bytes.Split(info, []byte{0}) {
		key, value, _ := strings.Cut(string(field), "=")
		switch key {
		case "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name != "" {
					needs = append(needs, strings.ReplaceAll(name, "-", "_"))
				}
			}
		case "softdep":
			pre, ok := strings.CutPrefix(value, "pre:")
			pre, _, _ = strings.Cut(pre, "post:")
			if !ok {
				continue
			}
			for _, name := range strings.Fields(pre) {
				// The generic form of an algorithm is always there to be had.
				name = strings.ReplaceAll(name, "-", "_")
				hints = append(hints, name, name+"_generic")
			}
		}
	}
	return needs, hints, nil
}
